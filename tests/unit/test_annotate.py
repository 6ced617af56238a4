"""Annotated copies: the label is there, whole and in letters that can be read."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw

from efficientformer.cli import annotate as module
from efficientformer.cli.results import Result
from efficientformer.runtime.inputs import Input


def copy_of(name, folder, monkeypatch):
    """Return the copy of a picture with a class of this name, and the text that was drawn on it."""
    file, drawn = BytesIO(), []
    Image.new("RGB", (32, 32), "red").save(file, "PNG")
    prediction = type("Prediction", (), {"name": name, "score": 0.923, "label": 7})()
    original = ImageDraw.ImageDraw.text

    def text(self, place, text, *rest, **options):
        drawn.append(text)
        return original(self, place, text, *rest, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    module.annotate(Result("x.png", prediction, "", Input("x.png", file.getvalue)), folder).save()
    return Image.open(folder / "x_label.jpg"), drawn[0]


@pytest.mark.parametrize("name", ["cat", "automobile", "black-footed ferret with a long name"])
def test_a_label_is_whole_on_a_small_picture(name, tmp_path, monkeypatch):
    copy, text = copy_of(name, tmp_path, monkeypatch)
    assert text == f"{name}  92.3%"
    bar = np.asarray(copy)[34:, :, 0]
    assert bar.max() > 200
    assert bar[:, -3:].max() < 90  # room to the right of the last letter


@pytest.mark.parametrize(
    ("name", "text"), [("\u72ac", "class 7  92.3%"), ("a\nb", "class 7  92.3%"), ("a b", "a b  92.3%")]
)
def test_a_name_that_the_font_cannot_write_is_a_number(name, text, tmp_path, monkeypatch):
    assert copy_of(name, tmp_path, monkeypatch)[1] == text


def test_a_name_without_end_makes_no_endless_picture(tmp_path, monkeypatch):
    assert copy_of("x" * 20_000, tmp_path, monkeypatch)[0].width == module.MAX_SIDE


def test_a_long_name_is_cut_by_bytes(tmp_path):
    file = BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    prediction = type("Prediction", (), {"name": "cat", "score": 0.9, "label": 7})()
    name = "猫" * 83 + ".jpg"
    module.annotate(Result(name, prediction, "", Input(name, file.getvalue)), tmp_path).save()
    assert [path.name for path in tmp_path.iterdir()] == ["猫" * 33 + "_label.jpg"]
