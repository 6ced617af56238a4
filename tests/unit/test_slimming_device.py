"""The device that slimming is for: tables that lack something, and machines that are busy."""

import dataclasses
import json
import shlex

import pytest

from efficientformer.cli.latency_table import _space
from efficientformer.latency import measure
from efficientformer.latency.design import TableSpace, all_parts
from efficientformer.latency.table import Cost, LatencyTable
from efficientformer.runtime.timing import environment
from efficientformer.slimming import device
from efficientformer.slimming.plan import Options, Plan
from efficientformer.slimming.space import Space, table_space
from efficientformer.slimming.start import make_plan
from efficientformer.spec.arch import AttentionSpec, BlockSpec
from efficientformer.spec.errors import SpecError, UsageError
from efficientformer.spec.variants import v1_spec, v2_spec
from efficientformer.training.recipe import Recipe

V1 = v1_spec((32, 48, 64, 128), (1, 1, 2, 2), 1, input_size=32, num_classes=3, distilled=False, stem_stride=1)
V2 = v2_spec((32, 48, 64, 96), ((4,), (4, 3), (4, 3, 3), (4,)), 1, input_size=64, num_classes=3, distilled=False)
PLAN = Plan("data", (1.0,), Recipe(), Recipe(), "onnxruntime", "fp32", None, Options())


def table_of(space, **changes):
    costs = {part.key: Cost(0.01, 0.01) for part in all_parts(space)}
    fields = {
        "engine": "onnxruntime", "precision": "fp32", "threads": 1, "family": space.family,
        "attention": space.attention, "base": Cost(0.1, 0.01), "costs": costs, "weights": {}, "spread": 0.01,
        "networks": 9,
    }  # fmt: skip
    return LatencyTable(**{**fields, **changes})


@pytest.mark.parametrize("start", [V1, V2], ids=["v1", "v2"])
def test_the_command_for_a_table_that_lacks_something_measures_all_of_it(start):
    space = Space(start)
    few = dataclasses.replace(table_space(space), widths=tuple(sorted({s.width for s in start.stages})), max_widths=())
    with pytest.raises(UsageError, match="parts of the networks that slimming may come to") as error:
        device.check_table(PLAN, space, table_of(few))
    words = shlex.split(error.value.hint.partition("latency-table ")[2])
    given = {name[2:].replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    names = ("like", "widths", "depths", "expansions", "input_size", "stem_stride")
    measured = _space(*(given[name] for name in names), int(given["classes"]))
    device.check_table(PLAN, space, table_of(measured))


def with_stage(start, index, **changes):
    """Return a network with one of its stages changed."""
    stages = list(start.stages)
    stages[index] = dataclasses.replace(stages[index], **changes)
    return dataclasses.replace(start, stages=tuple(stages))


@pytest.mark.parametrize(("stage", "embedding"), [(2, "attn"), (3, "conv")])
def test_a_table_covers_the_embeddings_of_the_start_network(stage, embedding):
    space = Space(with_stage(V2, stage, embedding=embedding))
    device.check_table(PLAN, space, table_of(table_space(space)))
    with pytest.raises(UsageError, match=r"no 'embedding .*--like START_NETWORK\.json"):
        device.check_table(PLAN, space, table_of(table_space(Space(V2))))


@pytest.mark.parametrize(
    ("stage", "strides", "says"),
    [
        (2, (1, 2), "attention of stage 3; expected one stride; found stride 1 and 2"),
        (3, (2,), "attention of stage 4; expected stride 1; found stride 2"),
    ],
)
def test_strides_that_no_table_covers_are_refused_before_anything_is_measured(
    monkeypatch, tmp_path, stage, strides, says
):
    monkeypatch.setattr(measure, "build_table", lambda *_, **__: pytest.fail("measured"))
    start = with_stage(V2, stage, blocks=tuple(BlockSpec("attn_ffn", 4, stride) for stride in strides))
    with pytest.raises(SpecError, match=says):
        device.open_table(PLAN, Space(start), tmp_path, None, quiet=True)


@pytest.mark.parametrize(
    "start",
    [
        dataclasses.replace(V1, in_chans=1),
        v2_spec((32, 48, 64, 96), ((4,), (4,), (4,), (4,)), 1, input_size=64, stage3_stride=1),
    ],
    ids=["one channel", "stride 1"],
)
def test_what_no_option_gives_is_taken_from_a_file(start):
    few = dataclasses.replace(table_space(Space(start)), widths=tuple(sorted({s.width for s in start.stages})))
    with pytest.raises(UsageError, match=r"--like START_NETWORK\.json"):
        device.check_table(PLAN, Space(start), table_of(few))


def test_a_table_of_an_older_version_in_the_run_s_own_folder_asks_for_another_folder(tmp_path):
    kept = tmp_path / device.TABLE
    kept.write_text(json.dumps({**table_of(table_space(Space(V1))).to_dict(), "schema": 1}))
    with pytest.raises(SpecError, match=r"table\.json: .*older version.*Start a new run in another folder"):
        device.open_table(PLAN, Space(V1), tmp_path, None, quiet=True)
    with pytest.raises(SpecError, match="Measure it again"):
        device.open_table(PLAN, Space(V1), tmp_path, kept, quiet=True)


def test_a_table_is_kept_once(tmp_path):
    given, kept = tmp_path / "given.json", tmp_path / device.TABLE
    table_of(table_space(Space(V1))).save(given)
    first = device.open_table(PLAN, Space(V1), tmp_path, given, quiet=True)
    before = kept.stat()
    assert device.open_table(PLAN, Space(V1), tmp_path, None, quiet=True) == first
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_table_of_other_attention_names_the_file_it_takes():
    start = dataclasses.replace(V2, attention=AttentionSpec(num_heads=2, key_dim=8))
    with pytest.raises(UsageError, match=r"another attention.*--like START_NETWORK.json"):
        device.check_table(PLAN, Space(start), table_of(table_space(Space(V2))))


def test_a_table_of_another_kind_is_not_one_that_lacks_parts():
    with pytest.raises(UsageError, match="another family; expected v2; found v1"):
        device.check_table(PLAN, Space(V1), table_of(table_space(Space(V2))))
    other = table_of(table_space(Space(V1)), input_sizes=((32, 32), (64, 32)))
    with pytest.raises(UsageError, match=r"another input size; expected 64x64; found 32x32,64x32.*--input-size 64x64"):
        device.check_table(PLAN, Space(V1.with_input_size(64)), other)


@pytest.mark.parametrize(("slower", "quiet"), [(1.0, 1.0), (1.2, 1.02), (1.27, 1.02), (1.3, 1.3), (2.8, 2.8)])
def test_a_busy_machine_is_noticed_by_the_table_s_spread_not_by_wide_error_bars(monkeypatch, slower, quiet):
    """Beyond a quarter nothing is taken off: it would hide that the table is wrong."""
    space = TableSpace(widths=(32, 48, 64, 128), depths=(1, 1, 2, 2), num_classes=3, stem_strides=(1,))
    wide = {part.key: Cost(0.01, 0.5) for part in all_parts(space)}  # costs that no network shows one by one
    table = table_of(space, costs=wide, environment=environment("onnxruntime"))
    usual = table.predict(V1).ms
    monkeypatch.setattr(
        measure, "measure_specs", lambda specs, **_: [measure.Latency(*[slower * usual] * 4, runs=1) for _ in specs]
    )
    (found,) = device.measured(table, [V1], V1)
    assert found.ms == pytest.approx(slower * usual, abs=1e-5)
    assert found.quiet_ms == pytest.approx(quiet * usual, abs=1e-5)
    assert found.scaled == ("at the table's speed" in str(found)) == (slower != quiet)


def test_an_expansion_bound_means_nothing_for_v1():
    with pytest.raises(SpecError, match="V1"):
        Options(min_expansion=2.0).space(V1)
    assert Options(min_expansion=2.0).space(V2).min_expansion == 2.0


def test_bounds_are_checked_before_the_start_network_is_known():
    plan = make_plan("data", [1.0], model="efficientformerv2_s0", settings=["search.min_expansion=2"])
    assert plan.options.min_expansion == 2.0
    with pytest.raises(SpecError, match="min_expansion"):
        make_plan("data", [1.0], model="efficientformerv2_s0", settings=["search.min_expansion=99"])
