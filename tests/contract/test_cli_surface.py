"""The command line's surface, frozen: a verb or an option appears or goes only with an edit here."""

import typer.main

from efficientformer.cli.app import app

SURFACE = {
    "predict": {
        "inputs", "model", "checkpoint", "top_k", "format_", "output", "annotate", "decode", "engine", "precision",
        "threads", "ray", "offline", "quiet",
    },
    "test": {
        "model", "data", "checkpoint", "split", "engine", "precision", "device", "batch_size", "workers", "as_json",
        "output", "report", "offline", "quiet",
    },
    "benchmark": {
        "models", "engine", "precision", "batch", "threads", "rounds", "compiled", "random_weights", "picture",
        "output", "as_json", "offline", "quiet",
    },
    "data check": {"folder", "as_json", "report", "no_near", "quiet"},
    "train": {
        "recipe", "data", "output", "resume", "model", "epochs", "batch_size", "lr", "seed", "settings", "device",
        "show", "quiet",
    },
    "slim": {
        "data", "target_latency", "engine", "precision", "threads", "table", "model", "recipe", "epochs",
        "final_epochs", "settings", "output", "resume", "quiet",
    },
    "quantize": {
        "model", "data", "output", "checkpoint", "max_drop", "pictures", "holdout", "weights_only", "engine",
        "weight_bits", "seed", "as_json",
        "offline", "quiet",
    },
    "list": {"pattern", "as_json"},
    "info": {"model", "as_json"},
    "convert": {"source", "target", "to", "model", "input_size", "labels", "ema", "half", "force"},
    "download": {"model", "source", "verify", "offline"},
    "profile": {
        "model", "checkpoint", "random_weights", "engine", "precision", "threads", "observations", "table", "as_json",
        "output", "offline", "quiet",
    },
    "latency-table": {
        "output", "engine", "precision", "threads", "like", "widths", "depths", "expansions", "input_size",
        "stem_stride", "classes", "networks", "max_spread", "quiet",
    },
}  # fmt: skip


def verbs(group, prefix=""):
    """Yield (name, command) of every verb; those of a group as ``group verb``."""
    for name, verb in group.commands.items():
        if hasattr(verb, "commands"):
            yield from verbs(verb, f"{prefix}{name} ")
        else:
            yield prefix + name, verb


def test_verbs_and_options():
    found = {
        name: {p.name for p in verb.params if p.name != "help"} for name, verb in verbs(typer.main.get_command(app))
    }
    assert found == SURFACE


def test_every_option_has_help_and_every_verb_stays_below_15_options():
    for _, verb in verbs(typer.main.get_command(app)):
        assert verb.help
        assert len(verb.params) < 15
        assert all(getattr(parameter, "help", "x") for parameter in verb.params)
