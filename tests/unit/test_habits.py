"""What other libraries' words lead to: something that exists, and never a wrong guess."""

import dataclasses
import importlib
import re

import pytest
import typer.main

import efficientformer
from efficientformer.cli.app import app
from efficientformer.runtime.engines import open_engine
from efficientformer.spec.errors import SpecError, UsageError
from efficientformer.spec.habits import COMMANDS, ENGINE_WORDS, NAMES, SETTINGS, pointer
from efficientformer.training.recipe import Recipe, override

VERBS = set(typer.main.get_command(app).commands)
FIELDS = {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_from_elsewhere_is_an_attribute_error_that_leads_on(name):
    with pytest.raises(AttributeError, match=re.escape(f"no attribute {name!r}. Here: {NAMES[name]}")):
        getattr(efficientformer, name)
    assert not hasattr(efficientformer, name)
    for module, found in re.findall(r"(efficientformer\.[\w.]+)\.(\w+)", NAMES[name]):
        assert hasattr(importlib.import_module(module), found)


def test_any_other_name_is_just_missing():
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
        _ = efficientformer.nonsense


@pytest.mark.parametrize("word", COMMANDS)
def test_a_command_from_elsewhere_leads_to_ours(cli, word):
    code, _, err = cli(word, "x", "--data", "y")
    assert (code, f"no command {word!r}. Here: {COMMANDS[word]}" in err) == (2, True)
    named = re.findall("efficientformer ([a-z-]+)", COMMANDS[word])
    assert word not in VERBS
    assert set(named) <= VERBS


def test_any_other_command_gets_the_nearest(cli):
    code, _, err = cli("predictt")
    assert code == 2
    assert "predict" in err


@pytest.mark.parametrize("word", SETTINGS)
def test_a_setting_from_elsewhere_leads_to_ours(word):
    assert word not in FIELDS
    for call in (
        lambda: override(Recipe(), [f"{word}=1"]),
        lambda: Recipe().with_changes(**{word: 1}),
        lambda: Recipe.from_dict({word: 1}),
    ):
        with pytest.raises(SpecError, match=re.escape(f"Unknown field {word!r} in the recipe. Here: ")) as caught:
            call()
        assert "Did you mean" not in str(caught.value)
    first = re.match(r"[\w-]+", SETTINGS[word]).group()
    assert first in FIELDS or first in ("--data", "--output", "--device", "left")


@pytest.mark.parametrize("word", ENGINE_WORDS)
def test_an_engine_from_elsewhere_leads_to_ours(word):
    with pytest.raises(UsageError, match=f"Here: {re.escape(pointer(ENGINE_WORDS, word)[6:])}"):
        open_engine("own.onnx", word)
