"""What a long job shows on a terminal."""

import io

import pytest
from rich.console import Console

from efficientformer.training.watch import Watch, new_bar

TEXT = "epoch 12/300  1,030 images/s  loss 1.347  top-1 79.69 %  best val top-1 83.33 %"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_time_left_is_shown_however_narrow_the_terminal_is(width):
    bar = new_bar()
    bar.add_task(TEXT, total=100, completed=40)
    screen = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    screen.print(bar.get_renderable())
    (line,) = screen.file.getvalue().splitlines()
    assert line.startswith(" 40% ")
    assert "-:--:-- left epoch 12/300" in line
    assert len(line) <= width


def test_no_name_of_a_picture_steers_the_terminal_or_splits_the_log(tmp_path, capsys):
    watch = Watch(tmp_path, 1, 0, 1, quiet=False)
    watch.left_out("training", [("a\x1b[31m\n.jpg", "broken")])
    watch.close()
    assert capsys.readouterr().err == "left out of the training pictures: a\\x1b[31m\\n.jpg: broken\n"
    assert len((tmp_path / "train.log").read_text().splitlines()) == 1
