"""Latency tables: keys, hostile files, missing parts, fitted costs; measuring and profiling with tiny networks."""

import dataclasses
import json
import math
import random
import warnings

import numpy as np
import pytest

from efficientformer.latency import groups, measure, observations
from efficientformer.latency.design import TableSpace, all_parts, design, sample
from efficientformer.latency.fit import fit_parts
from efficientformer.latency.groups import TIES, divide, scale_to_first
from efficientformer.latency.measure import Latency, _passes_missing, build_table, measure_specs
from efficientformer.latency.parts import Part, parts_of, weights_of
from efficientformer.latency.table import ELSEWHERE, HERE, Cost, LatencyTable
from efficientformer.runtime import cgroup
from efficientformer.runtime.timing import environment
from efficientformer.slimming.space import Space, table_space
from efficientformer.spec.arch import AttentionSpec
from efficientformer.spec.errors import SpecError, UsageError
from efficientformer.spec.variants import VARIANTS, v1_spec, v2_spec

SPACE = TableSpace(widths=(8, 16, 24), depths=(1, 1, 2, 2), stem_strides=(2,), attention=AttentionSpec(2, 8, 2))
SPEC = dataclasses.replace(
    v1_spec((8, 16, 16, 24), (1, 0, 1, 2), 1, input_size=32, num_classes=10, stem_stride=2), attention=SPACE.attention
)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Measure no longer than it takes: what is tested here is not how well latencies are known."""
    monkeypatch.setattr("efficientformer.latency.measure.LEAST_S", 0.01)


def test_too_many_parts_are_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(measure, "_time_specs", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(measure, "MAX_PARTS", 50)
    with pytest.raises(SpecError, match="Too many parts"):
        build_table(SPACE)


def made_up(space=SPACE, **changes):
    """Return a table in which part number i costs i microseconds."""
    costs = {part.key: Cost(index / 1000, 0.0001) for index, part in enumerate(all_parts(space))}
    fields = {
        "engine": "onnxruntime", "precision": "fp32", "threads": 2, "family": space.family,
        "attention": space.attention, "base": Cost(0.5, 0.01), "costs": costs, "weights": {0.001: Cost(2.0, 0.1)},
        "spread": 0.02, "networks": 3, "environment": {"hardware": "a phone"}, "input_sizes": ((32, 32),),
    }  # fmt: skip
    return LatencyTable(**(fields | changes))


def fitted(space, fit):
    """Return the table of a fit."""
    costs = {part.key: Cost(*cost) for part, cost in fit.parts.items()}
    weights = {bend: Cost(*cost) for bend, cost in fit.weights.items()}
    return made_up(space, base=Cost(*fit.base), costs=costs, weights=weights, spread=fit.spread, smallest=fit.smallest)


def test_keys_name_every_part_and_are_read_back():
    keys = [part.key for part in parts_of(SPEC)]
    assert keys == [
        "stem 3-8 stride 2 at 16x16", "first mb4d 8 at 16x16", "mb4d 8 x4 at 16x16", "embedding conv 8-16 at 8x8",
        "embedding conv 16-16 at 4x4", "first mb4d 16 at 4x4", "mb4d 16 x4 at 4x4", "embedding conv 16-24 at 2x2",
        "first mb4d 24 at 2x2", "first mb3d 24 at 2x2", "mb4d 24 x4 at 2x2", "mb3d 24 x4 at 2x2", "head 24-10 at 2x2",
    ]  # fmt: skip
    many = dataclasses.replace(SPEC, num_classes=1_000_000)
    for spec in (SPEC, many, *VARIANTS.values()):
        assert tuple(Part.parse(part.key) for part in parts_of(spec)) == parts_of(spec)


def test_a_block_on_tokens_is_timed_without_the_reshapes_around_it():
    base, reshapes, block = 1.0, 3.0, 0.25
    ms = {"none": base, "tokens one": base + reshapes + block}
    ms["tokens"] = ms["tokens one"] + observations.BLOCKS * block
    timings = {name: Latency(ms.get(name, 2.0), 0.0, 0.0, 0.0, 1) for name in observations._subjects()}
    found = {each.name: each.ms for each in observations._mixers(timings).variants}
    assert found["block with attention on tokens (MB3D)"] == pytest.approx(block)


def observed(find, **ms):
    """Return an observation of latencies, or of pairs of one and its standard error."""
    pairs = {name.replace("_", " "): value if isinstance(value, tuple) else (value, 0.01) for name, value in ms.items()}
    timings = {name: Latency(*pairs.get(name, (1.0, 0.01)), 0.0, 0.0, 1) for name in observations._subjects()}
    return find(timings)


@pytest.mark.parametrize(
    ("linear", "error", "holds"),
    [(9.0, 0.01, True), (9.0, 2.0, None), (5.0, 0.01, False), (5.4, 0.01, True), (5.1, 0.2, None), (3.0, 0.1, False)],
)
def test_an_observation_holds_or_not_or_cannot_be_told(linear, error, holds):
    """Blocks of convolutions take 1 ms each; LayerNorm and linear layers as much as the parameter says, less 1."""
    subjects = {"none": 0.0, "conv_gelu": (4.0, error), "linear_one": 1.0, "linear_gelu": (linear, error)}
    found = observed(observations._norms, **subjects)
    assert found.holds is holds
    word = {True: "holds here", False: "does not hold here", None: "cannot be told here: the errors are too large"}
    assert found.reason.startswith(word[holds])


def test_stems_are_judged_for_each_stride():
    found = observed(observations._stems, patch_16=10.0, stem_16=5.0)
    assert (found.holds, found.reason) == (None, "to stride 16: holds here; to stride 4: does not hold here")
    both = observed(observations._stems, patch_16=10.0, stem_16=5.0, patch_4=10.0, stem_4=5.0)
    assert (both.holds, both.reason) == (True, "holds here")


def test_activations_are_judged_by_what_the_paper_s_phone_did():
    assert observed(observations._activations, none=0.0, conv_hardswish=4.0).holds
    found = observed(observations._activations, none=0.0, conv_gelu=4.0)
    assert found.holds is False
    mixed = observed(observations._activations, none=0.0)
    assert mixed.reason == "GELU hardly slower than ReLU: holds here; hard-swish slower than GELU: does not hold here"


def test_a_map_of_an_embedding_with_attention_is_told_from_one_that_leads_to_the_same():
    keys = []
    for side in (3, 4):
        spec = v2_spec((8, 16, 16, 24), ((2,), (2,), (), (2,)), 1, input_size=8 * side, stem_stride=2)
        keys.append(next(part.key for part in parts_of(spec) if part.kind == "embedding attn"))
        assert Part.parse(keys[-1]).key == keys[-1]
    assert keys == ["embedding attn 16-24 from 3x3 at 2x2", "embedding attn 16-24 from 4x4 at 2x2"]
    assert Part.parse("embedding attn 16-24 at 2x2"), "of an older table, which can still be read"


@pytest.mark.parametrize("key", ["", "mb4d", "mb4d 8 at 4x4", "mb4d 08 x4 at 4x4", "stem 3-8 at 4x4", "x" * 100_000])
def test_other_keys_are_refused(key):
    with pytest.raises(SpecError):
        Part.parse(key)


def test_what_first_blocks_add_is_told_from_blocks():
    """Attention on tokens changes the layout once in a stage, however many blocks of it there are."""
    specs = design(TableSpace(), 160)

    def truth(spec):
        return sum((0.3 if part.kind == "first mb3d" else 0.1) * part.width / 64 for part in parts_of(spec))

    fit = fit_parts(specs, [truth(spec) for spec in specs], all_parts(TableSpace()))
    first, block = (fit.parts[Part.parse(key)][0] for key in ("first mb3d 128 at 4x4", "mb3d 128 x4 at 4x4"))
    assert first == pytest.approx(0.6, rel=0.1)
    assert block == pytest.approx(0.2, rel=0.1)


def test_a_prediction_adds_up():
    table = made_up()
    expected = 0.5 + sum(table.costs[part.key].ms for part in parts_of(SPEC)) + 2.0 * (weights_of(SPEC) / 1e6 - 0.001)
    found = table.predict(SPEC)
    assert found.ms == pytest.approx(expected)
    assert found.error_ms > 2 * 0.02 * found.ms


def test_parts_cost_more_in_a_larger_network():
    millions = weights_of(SPEC) / 1e6
    block = Part.parse("mb3d 24 x4 at 2x2").key
    grows = made_up().costs | {block: dataclasses.replace(made_up().costs[block], growth_ms=0.5)}

    def added(smallest):
        return made_up(costs=grows, smallest=smallest).predict(SPEC).ms - made_up().predict(SPEC).ms

    assert added(millions / 8) == pytest.approx(3 * 0.5)
    assert added(2 * millions) == added(0) == 0


def test_the_fit_finds_that_parts_cost_more_in_a_larger_network():
    specs = design(TableSpace(), 180)
    smallest = min(map(weights_of, specs))

    def truth(spec):
        doublings = math.log2(weights_of(spec) / smallest)
        blocks = [part for part in parts_of(spec) if part.is_block]
        return 0.1 + sum((part.width / 64) ** 2 * (0.2 + 0.1 * doublings) for part in blocks)

    fit = fit_parts(specs, list(map(truth, specs)), all_parts(TableSpace()))
    unseen = [sample(TableSpace(), random.Random(seed)) for seed in range(100, 140)]
    table = fitted(TableSpace(), fit)
    assert np.mean([abs(table.predict(spec).ms / truth(spec) - 1) for spec in unseen]) < 0.02


def test_the_second_head_is_not_counted():
    assert weights_of(SPEC) == weights_of(dataclasses.replace(SPEC, distilled=False))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"input_size": (64, 64)}, "stem 3-8 stride 2 at 32x32"),
        ({"num_classes": 11}, "head 24-11 at 2x2"),
        ({"attention": AttentionSpec(4, 8, 2)}, "another attention"),
    ],
)
def test_what_is_not_in_the_table_is_an_error_that_names_the_command(change, named):
    with pytest.raises(UsageError, match=named) as caught:
        made_up().predict(dataclasses.replace(SPEC, **change))
    assert "efficientformer latency-table --engine onnxruntime --precision fp32 --threads 2" in str(caught.value)


def test_widths_between_are_an_error_unless_asked_for():
    table = made_up()
    odd = dataclasses.replace(
        SPEC, stages=(SPEC.stages[0], dataclasses.replace(SPEC.stages[1], width=12), *SPEC.stages[2:])
    )
    assert table.missing(odd) == ("embedding conv 8-12 at 8x8", "embedding conv 12-16 at 4x4")
    with pytest.raises(UsageError):
        table.predict(odd)
    part = Part.parse("embedding conv 12-16 at 4x4")
    ends = [table.costs[part.widened(dim=dim).key].ms for dim in (8, 16)]
    assert table._lookup(part, True).ms == pytest.approx(sum(ends) / 2)
    assert table.predict(odd, interpolate=True).error_ms > table.predict(SPEC).error_ms
    grown = dataclasses.replace(table.costs["embedding conv 16-16 at 4x4"], growth_ms=1.0)
    grows = made_up(costs=table.costs | {"embedding conv 16-16 at 4x4": grown}, smallest=weights_of(odd) / 16e6)
    assert grows.predict(odd, interpolate=True).error_ms > table.predict(odd, interpolate=True).error_ms + 3.9
    wide = dataclasses.replace(SPEC, stages=(*SPEC.stages[:3], dataclasses.replace(SPEC.stages[3], width=32)))
    with pytest.raises(UsageError, match="16-32"):
        table.predict(wide, interpolate=True)


def test_files_are_read_back_and_nothing_half_written(tmp_path):
    table = made_up()
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]
    with pytest.raises(UsageError):
        table.save(tmp_path / "nowhere" / "table.json")
    with pytest.raises(UsageError):
        LatencyTable.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 4}, {"smallest": -1}, {"base": [1, 0, 1]}, {"costs": {"mb4d 8 x4 at 4x4": [1, 0, -1]}},
        {"costs": {}}, {"costs": {"mb4d 8 x4 at 4x4": [1]}}, {"costs": {"nonsense": [1, 1]}},
        {"costs": {"mb4d 8 x4 at 4x4": [-1.0, 0]}}, {"costs": [1]}, {"base": "x"}, {"engine": "tflite"}, {"extra": 1},
        {"spread": float("nan")}, {"weights": [[1, 2]]}, {"input_sizes": [[0, 1]]}, {"threads": True},
        {"environment": 3}, {"attention": {}, "family": "v3"},
    ],
)  # fmt: skip
def test_hostile_tables_are_refused(tmp_path, change):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(made_up().to_dict() | change))
    with pytest.raises(SpecError):
        LatencyTable.load(path)


def test_a_table_of_an_older_version_is_to_be_measured_again(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(made_up().to_dict() | {"schema": 1}))
    with pytest.raises(SpecError, match=r"older version(?s:.)*Measure it again"):
        LatencyTable.load(path)


def test_a_table_of_before_parts_grew_is_read(tmp_path):
    older = made_up().to_dict() | {"schema": 2}
    del older["smallest"]
    older["costs"] = {key: row[:2] for key, row in older["costs"].items()}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(older))
    assert LatencyTable.load(path) == made_up()


def test_weights_cost_what_they_do_between_one_threshold_and_the_next():
    millions = weights_of(SPEC) / 1e6
    free = made_up(weights={}).predict(SPEC).ms
    costs = {millions / 2: Cost(8.0, 0), millions / 4: Cost(4.0, 0), 2 * millions: Cost(100.0, 0)}
    assert made_up(weights=costs).predict(SPEC).ms == pytest.approx(free + millions / 4 * 4.0 + millions / 2 * 8.0)


def test_no_json_is_refused(tmp_path):
    path = tmp_path / "table.json"
    for content in (b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"null"):
        path.write_bytes(content)
        with pytest.raises(SpecError):
            LatencyTable.load(path)


def test_the_origin_is_found_by_the_environment():
    here = environment("onnxruntime")
    assert made_up(environment=here).origin == HERE
    assert made_up().origin == ELSEWHERE
    assert made_up(environment=here | {"hardware": "a phone"}).origin == ELSEWHERE
    assert made_up(environment=here | {"versions": {"onnxruntime": "0.1"}}).origin == ELSEWHERE
    assert made_up(environment=here | {"versions": 7}).origin == ELSEWHERE


def test_the_device_of_a_table_is_said_whatever_the_file_holds():
    assert made_up().device == "a phone, unknown date"
    hostile = {"hardware": "\ud800\x1b[31m", "date": ["2026"]}
    assert made_up(environment=hostile).device == "\\ud800\\x1b[31m, ['2026']"


def test_a_sample_shows_every_block_and_has_no_part_the_table_lacks():
    specs = design(SPACE, 5)
    assert specs == design(SPACE, 5)
    assert specs != design(SPACE, 5, seed=1)
    shown, known = {part for spec in specs for part in parts_of(spec)}, set(all_parts(SPACE))
    assert {part for part in known if part.is_block} <= shown
    rng = random.Random(3)
    for space in (
        SPACE,
        TableSpace(family="v2", widths=(8, 16), input_sizes=((64, 32), (96, 96)), max_widths=(8, 8, 16, 16)),
    ):
        known = set(all_parts(space))
        assert all(set(parts_of(sample(space, rng))) <= known for _ in range(200))


def test_a_quarter_of_the_sample_is_shallow():
    """Else the costs of embeddings are known from networks that mostly consist of blocks."""
    deepest = [max(len(stage.blocks) for stage in spec.stages) for spec in design(TableSpace(), 160)]
    assert 40 <= sum(depth <= 1 for depth in deepest) <= 50
    assert max(deepest) == max(TableSpace().depths)


@pytest.mark.parametrize(
    "change", [{"widths": ()}, {"widths": (8, 8)}, {"depths": (1, 1)}, {"family": "v3"}, {"input_sizes": (4,)}]
)
def test_spaces_without_networks_are_refused(change):
    with pytest.raises(SpecError):
        dataclasses.replace(SPACE, **change)


def test_the_fit_finds_the_costs_that_made_the_latencies():
    rng = np.random.default_rng(0)
    specs = design(TableSpace(), 150, seed=1)

    def truth(spec):
        ms = 0.1 + 0.05 * max(0.0, weights_of(spec) / 1e6 - 2)
        for part in parts_of(spec):
            scale = {"stem": 0.1, "head": 0.01, "mb4d": 0.2, "mb3d": 0.5}.get(part.kind, 0.05)
            channels = part.width / 64 if part.kind != "head" else part.dim / 64
            ms += scale * (0.02 + 0.1 * channels + 0.1 * channels**2) * (1 + part.grid[0] / 8)
        return ms

    measured = [truth(spec) * (1 + 0.01 * rng.standard_normal()) for spec in specs]
    measured[3] *= 1.5  # a disturbed network
    fit = fit_parts(specs, measured, all_parts(TableSpace()))
    assert 0.005 < fit.spread < 0.025
    table = fitted(TableSpace(), fit)
    unseen = [sample(TableSpace(), random.Random(seed)) for seed in range(100, 140)]
    errors = np.array([table.predict(spec).ms / truth(spec) - 1 for spec in unseen])
    assert np.abs(errors).mean() < 0.02
    inside = [abs(table.predict(spec).ms - truth(spec)) < table.predict(spec).error_ms for spec in unseen]
    assert np.mean(inside) > 0.85


def test_the_fit_knows_that_channels_are_computed_in_blocks():
    """As in OpenVINO with AMX: 48 channels of a block cost what 64 do, and 16 what 32 do."""
    specs = [sample(TableSpace(), random.Random(seed)) for seed in range(180)]

    def padded(channels):
        return math.ceil(channels / 32) / 2

    def cost(part):
        if part.is_block:
            return part.expansion * part.width / 64 * padded(part.width)
        if part.kind == "stem":
            return part.width / 128 * padded(part.width)
        return part.dim / 64 * padded(part.width) if part.kind.startswith("embedding") else 0.0

    truth = [0.1 + 0.1 * sum(map(cost, parts_of(spec))) for spec in specs]
    fit = fit_parts(specs, truth, all_parts(TableSpace()))
    assert np.abs(fit.errors).mean() < 0.01


@pytest.mark.parametrize("noise", [0.01, 0.03])
def test_error_bars_of_a_small_space_are_as_wide_as_its_errors(noise):
    """Few widths and depths: no part is known well by itself, and every network is."""
    space = table_space(Space(v1_spec((16, 32, 32, 48), (1, 1, 2, 2), 1, input_size=32, num_classes=3, stem_stride=2)))
    rng = np.random.default_rng(0)

    def truth(spec):
        parts = [part for part in parts_of(spec) if not part.kind.startswith("first")]
        return 0.1 + sum(0.01 + (part.width / 64) ** 2 * (1 + part.grid[0] / 8) / 9 for part in parts)

    specs = design(space, 160)
    measured = [truth(spec) * (1 + noise * rng.standard_normal()) for spec in specs]
    fit = fit_parts(specs, measured, all_parts(space))
    table = fitted(space, fit)
    predictions = {spec: table.predict(spec) for spec in (sample(space, random.Random(seed)) for seed in range(60))}
    again = {spec: truth(spec) * (1 + noise * rng.standard_normal()) for spec in predictions}
    inside = [abs(found.ms - again[spec]) <= found.error_ms for spec, found in predictions.items()]
    assert np.mean(inside) > 0.85
    assert max(found.error_ms / found.ms for found in predictions.values()) < 4 * noise


def test_small_networks_run_more_often():
    large = v1_spec((96, 96, 96, 96), (2, 2, 2, 2), 0, input_size=64, num_classes=10)
    small, other = measure_specs([SPEC, large], engine="onnxruntime", threads=1, passes=2, max_spread=1.0)
    assert small.ms < 1.0 < other.ms
    assert small.runs > 20  # of a network of a tenth of a millisecond
    assert other.runs < small.runs
    assert 0 < small.error_ms < small.ms


@pytest.mark.parametrize(
    ("done", "excess", "missing"),
    [(1, math.inf, 47), (1, 0.5, 7), (8, 0.9, 0), (8, 1.2, 4), (8, 5.0, 40), (47, 1.001, 1), (48, 3.0, 0)],
)
def test_passes_are_added_until_latencies_are_known(done, excess, missing):
    assert _passes_missing(done, excess, 8, 48) == missing


def test_a_table_is_measured_and_predicts(tmp_path):
    steps = []
    table = build_table(
        SPACE, engine="onnxruntime", threads=1, networks=12, max_spread=1.0, progress=lambda *step: steps.append(step)
    )
    assert (table.engine, table.precision, table.threads, table.origin) == ("onnxruntime", "fp32", 1, HERE)
    assert {step for step, _, _ in steps} == {"opening networks", "timing"}
    table.save(tmp_path / "table.json")
    loaded = LatencyTable.load(tmp_path / "table.json")
    for spec in (SPEC, sample(SPACE, random.Random(9))):
        assert 0 < loaded.predict(spec).ms < 1000
        assert loaded.predict(spec).error_ms > 0
    timing = measure_specs([SPEC], engine="onnxruntime", threads=1, passes=1, max_spread=1.0)[0]
    assert 0 < timing.p10_ms <= timing.p90_ms
    assert timing.ms <= timing.p90_ms
    assert 0 < timing.error_ms < timing.ms


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_int8_networks_are_measured(engine):
    pytest.importorskip(engine)
    timing = measure_specs([SPEC], engine=engine, precision="int8", threads=1, passes=1, max_spread=1.0)[0]
    assert timing.runs >= 10


def test_a_machine_that_never_repeats_is_told(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr("efficientformer.latency.measure.time_turn", lambda run, runs: [rng.uniform(1, 3)] * runs)
    with pytest.warns(UserWarning, match="busy.*latencies repeat within .*, 1.00% wanted"):
        measure_specs([SPEC, SPEC], engine="onnxruntime", threads=1)
    with warnings.catch_warnings():  # one network repeats relative to itself
        warnings.simplefilter("error")
        measure_specs([SPEC], engine="onnxruntime", threads=1)


def test_passes_differ_in_their_order(monkeypatch):
    order = []
    monkeypatch.setattr(
        "efficientformer.latency.measure.time_turn", lambda run, runs: order.append(run) or [1.0] * runs
    )
    measure_specs([SPEC] * 6, engine="onnxruntime", threads=1, passes=3)
    first, second, third = (order[start : start + 6] for start in (6, 12, 18))  # the first six said how long they take
    assert set(map(id, first)) == set(map(id, second)) == set(map(id, third))
    assert len({tuple(map(id, each)) for each in (first, second, third)}) > 1


def test_a_measurement_lasts_long_enough_to_meet_more_than_one_moment(monkeypatch):
    moments = iter(range(10_000))
    monkeypatch.setattr("efficientformer.latency.measure.LEAST_S", 2.0)
    monkeypatch.setattr("efficientformer.latency.measure.time_turn", lambda run, runs: [1.0] * runs)
    monkeypatch.setattr("efficientformer.latency.measure.time.perf_counter", lambda: 0.1 * next(moments))
    (latency,) = measure_specs([SPEC], engine="onnxruntime", threads=1)
    assert latency.runs == 20 * 2  # a pass takes 0.1 s here


def test_all_are_one_group_where_they_fit():
    assert divide([1.0] * 20, 20) == [list(range(20))]


def test_groups_fit_into_memory_and_share_their_first_networks():
    sizes = [float(size) for size in random.Random(0).sample(range(1, 101), 100)]
    found = divide(sizes, 1200)
    ties = found[0][:TIES]
    assert len(found) > 4
    assert all(group[:TIES] == ties for group in found)
    assert max(sizes[tie] for tie in ties) <= 50
    assert sorted(number for group in found for number in group[TIES:]) == sorted(set(range(100)) - set(ties))
    assert max(sum(sizes[number] for number in group) for group in found) < 1300
    assert all(len(group) == TIES + 1 for group in divide(sizes, 10))  # one at a time if that is all there is


def test_groups_are_brought_to_the_time_of_the_first():
    rng = np.random.default_rng(0)
    true = rng.uniform(0.2, 5.0, TIES)
    measured = [true, [*(2 * true * np.exp(0.01 * rng.standard_normal(TIES))), 3.0]]  # everything took twice as long
    (one, nothing), (factor, error) = scale_to_first(measured)
    assert (one, nothing) == (1.0, 0.0)
    assert factor == pytest.approx(0.5, rel=0.02)
    assert 0.001 < error < 0.02


def test_networks_beyond_the_memory_are_measured_in_groups(monkeypatch):
    specs = [sample(SPACE, random.Random(seed)) for seed in range(TIES + 4)]
    monkeypatch.setattr("efficientformer.latency.measure.free_memory", lambda: 1)
    steps, most = [], []
    monkeypatch.setattr(
        "efficientformer.latency.measure.time_engines",
        lambda engines, **_: (
            most.append(len(engines)) or [Latency(2.0 + len(most), 0.1, 1.0, 9.0, 10) for _ in engines]
        ),
    )
    found = measure_specs(specs, engine="onnxruntime", threads=1, progress=lambda *step: steps.append(step))
    assert most == [TIES + 1] * 4
    assert steps[-1] == ("opening networks (group 4 of 4)", TIES + 1, TIES + 1)
    assert [latency.ms for latency in found] == pytest.approx([3.0] * len(specs))  # as in the first group
    assert {latency.runs for latency in found} == {10}


def test_free_memory_is_that_of_the_container(monkeypatch, tmp_path):
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    whole = groups.free_memory()
    assert whole > 1 << 20
    own = tmp_path / "service"
    own.mkdir()
    (tmp_path / "membership").write_text("0::/service\n")
    for folder in (tmp_path, own):
        (folder / "memory.max").write_text("max\n")
        (folder / "memory.current").write_text("1500\n")
        (folder / "memory.stat").write_text("anon 1000\ninactive_file 500\nactive_file 0\n")
    assert groups.free_memory() > 1 << 20
    (tmp_path / "memory.max").write_text("5000\n")
    assert groups.free_memory() == 4000
    (own / "memory.max").write_text("3000\n")
    assert groups.free_memory() == 2000


def test_free_memory_is_that_of_the_older_kind_of_container(monkeypatch, tmp_path):
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text("4:memory:/\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("5000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("4600\n")
    (tmp_path / "memory" / "memory.stat").write_text("inactive_file 100\ntotal_inactive_file 600\n")
    assert groups.free_memory() == 1000


def test_nothing_to_measure_is_an_error():
    with pytest.raises(UsageError):
        measure_specs([])


@pytest.mark.parametrize("max_spread", [0, -1.0, math.nan, "1"])
def test_a_spread_that_no_latency_has_is_refused(max_spread):
    with pytest.raises(SpecError, match="spread"):
        measure_specs([SPEC], engine="onnxruntime", threads=1, max_spread=max_spread)
