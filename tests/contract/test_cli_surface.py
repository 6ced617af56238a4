"""The command line's surface, frozen: a verb or an option appears or goes only with an edit here."""

import typer.main

from efficientformer.cli.app import app

SURFACE = {
    "predict": {
        "inputs", "model", "checkpoint", "top_k", "format_", "output", "annotate", "batch_size", "engine", "threads",
        "offline", "quiet",
    },
    "list": {"pattern", "as_json"},
    "info": {"model", "as_json"},
    "convert": {"source", "target", "to", "model", "input_size", "ema", "half", "force"},
    "download": {"model", "source", "verify", "offline"},
}  # fmt: skip


def test_verbs_and_options():
    group = typer.main.get_command(app)
    found = {name: {p.name for p in verb.params if p.name != "help"} for name, verb in group.commands.items()}
    assert found == SURFACE


def test_every_option_has_help_and_every_verb_stays_below_15_options():
    for verb in typer.main.get_command(app).commands.values():
        assert verb.help
        assert len(verb.params) < 15
        assert all(getattr(parameter, "help", "x") for parameter in verb.params)
