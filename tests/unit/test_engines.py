"""Both engines run one file, agree, and say what they compute in; what cannot be done is refused by name."""

import copy
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from efficientformer import Classifier
from efficientformer.benchmarking.worker import _batch_runs
from efficientformer.export.deployable import embedded_file
from efficientformer.runtime.classifier import FileClassifier
from efficientformer.runtime.engines import damaged_engines, installed_engines, open_engine, settle_precision
from efficientformer.runtime.engines.onnxruntime import OnnxRuntimeEngine
from efficientformer.runtime.engines.openvino import MAX_COMPILED, OpenVinoEngine
from efficientformer.spec.errors import EngineError, MissingExtraError, PrecisionError, UsageError

FILE = embedded_file()
PHOTO = Path(__file__).parents[2] / "examples" / "cat.jpg"


def pictures(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32), np.float32)


def break_import(monkeypatch, folder, engine):
    """Put an engine whose import fails before the one that is installed."""
    (folder / engine).mkdir(exist_ok=True)
    (folder / engine / "__init__.py").write_text("raise AttributeError('built for another numpy')")
    monkeypatch.delitem(sys.modules, engine, raising=False)
    monkeypatch.syspath_prepend(folder)


def break_openvino(monkeypatch, folder):
    """Put an OpenVINO whose import fails before the one that is installed."""
    break_import(monkeypatch, folder, "openvino")


def without_plugin(monkeypatch):
    """Have OpenVINO lack its plugin for CPUs, as a damaged installation does."""
    core = Mock(get_property=Mock(side_effect=RuntimeError("Device with name CPU is not registered")))
    monkeypatch.setattr("efficientformer.runtime.engines.openvino._CORES", {})
    monkeypatch.setattr("openvino.Core", lambda: core)


def without_compiler(monkeypatch):
    """Have OpenVINO open files and run none."""
    monkeypatch.setattr(OpenVinoEngine, "_compile", Mock(side_effect=RuntimeError("unsupported operation")))


@pytest.fixture(scope="module")
def reference():
    return open_engine(FILE, "onnxruntime")


def test_engines_agree_in_single_precision(reference):
    batch = pictures(5)
    expected, found = reference.run(batch), open_engine(FILE, "openvino", precision="fp32").run(batch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_auto_says_what_runs(reference):
    engine = open_engine(FILE)
    assert engine.key == installed_engines()[0] == "openvino"
    assert engine.precision in engine.name
    # half precision rounds each product to 8 bits: decisions stay, digits do not
    batch = pictures(64)
    assert (engine.run(batch).argmax(1) == reference.run(batch).argmax(1)).mean() > 0.95


def test_what_cannot_be_imported_is_not_taken(monkeypatch, tmp_path):
    with monkeypatch.context() as damaged:
        break_openvino(damaged, tmp_path)
        assert (installed_engines(), damaged_engines()) == (("onnxruntime",), ("openvino",))
        with pytest.warns(UserWarning, match="openvino is installed, its import fails.*another numpy"):
            assert open_engine(FILE).key == "onnxruntime"
    (tmp_path / "openvino" / "__init__.py").unlink()  # a mere folder of that name, without a library anywhere
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert (installed_engines(), damaged_engines()) == (("onnxruntime",), ())
    assert open_engine(FILE).key == "onnxruntime"


FIRST_RUNS = """
import os, signal, sys, threading
import numpy as np
import openvino, openvino.frontend
from efficientformer.export.deployable import embedded_file
from efficientformer.runtime.engines import open_engine
sys.setswitchinterval(1e-6)
def first_runs():
    engine = open_engine(embedded_file(), "openvino", precision="fp32", streams=2, threads=2)
    engine._for_batch(1)
    together = threading.Barrier(2)
    def run():
        together.wait()
        engine.run(np.zeros((1, 3, 32, 32), np.float32))
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
ends = []
for _ in range(10):  # forked, so that libraries are loaded once; each has its first runs still before it
    child = os.fork()
    if not child:
        signal.alarm(40)  # ends it also where Python's lock is waited for
        first_runs()
        os._exit(0)
    ends.append(os.waitpid(child, 0)[1])
    if ends[-1]: break
print(ends)
"""


def test_the_first_runs_of_a_process_do_not_lock_each_other_out():
    """Without care one process in three hangs here, so ten that do not are no luck."""
    done = subprocess.run([sys.executable, "-c", FIRST_RUNS], capture_output=True, text=True, timeout=400, check=True)
    assert done.stdout.split("\n")[0] == str([0] * 10), done.stdout + done.stderr


FORKED = """
import os, signal, sys
from pathlib import Path
from efficientformer import Classifier
classify, photos = Classifier(engine="openvino", threads=2), sorted(Path(sys.argv[1]).glob("*.jpg"))
def labels():
    return [each.label for each in classify.predict(photos)], [each.label for each in classify.predict(photos[:2])]
def forked(work):
    child = os.fork()
    if not child:
        signal.alarm(60)
        work()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
def same():
    assert labels() == right
    assert classify(photos[0]).label == right[0][0]
right = labels()
assert len(photos) >= 8
forked(lambda: (same(), forked(same)))
same()
print("right", flush=True)
"""


def test_a_forked_child_opens_its_own_network_for_it_has_no_threads_of_the_other():
    command = [sys.executable, "-c", FORKED, Path(__file__).parents[2] / "examples"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert (done.stdout, done.returncode) == ("right\n", 0), done.stderr


SIGNALLED = """
import os, signal
from efficientformer.export.deployable import embedded_file
from efficientformer.latency.profile import profile_file
from efficientformer.runtime.engines import open_engine
engines = [open_engine(embedded_file(), "openvino") for _ in range(2)]
profile_file(embedded_file(), engine="openvino", threads=1, runs=8)
while engines:
    engines.pop(0)  # the first one first
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("KeyboardInterrupt")
"""


def test_ctrl_c_after_several_networks_is_an_interrupt_and_no_segmentation_fault():
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=200, check=False)
    assert (done.stdout, done.returncode) == ("KeyboardInterrupt\n", 0), done.stderr


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_classifier_can_be_copied_and_sent_to_other_processes(name, tmp_path, monkeypatch):
    shutil.copy(FILE, tmp_path / "network.onnx")
    monkeypatch.chdir(tmp_path)
    classify = Classifier("network.onnx", engine=name, precision="fp32", threads=2)
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    right = classify(photo)
    classify.open_for_many()
    monkeypatch.chdir("/")
    for twin in (copy.deepcopy(classify), pickle.loads(pickle.dumps(classify))):
        assert (twin.engine, twin.reason, twin._for_many) == (classify.engine, classify.reason, None)
        assert (twin._engine.streams, twin.open_for_many().streams) == (1, 2)
        np.testing.assert_allclose(twin(photo).scores, right.scores, atol=1e-6)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (found,) = pool.map(classify, [photo])
    np.testing.assert_allclose(found.scores, right.scores, atol=1e-6)
    sent = pickle.dumps(classify)
    (tmp_path / "network.onnx").write_bytes(FILE.read_bytes()[:-1])
    with pytest.raises(EngineError, match="changed or removed"):
        pickle.loads(sent)


def test_smaller_batches_reuse_a_larger_one_and_few_are_kept():
    engine = OpenVinoEngine(FILE, precision="fp32")
    batch = pictures(8)
    whole = engine.run(batch)
    for size in (1, 3, 8, 2, 7):
        np.testing.assert_allclose(engine.run(batch[:size]), whole[:size], atol=1e-4)
    assert list(engine._compiled) == [1, 8]
    for size in (9, 10, 11):
        engine.run(pictures(size))
    assert len(engine._compiled) == MAX_COMPILED


def test_who_times_batches_has_each_as_it_is():
    engine = OpenVinoEngine(FILE, precision="fp32")
    runs = _batch_runs(engine, [16, 1, 4, 2])
    for name in ("16", "4", "2", "1", "4"):
        runs[name]()
    assert set(engine._compiled) == {1, 2, 4, 16}


def test_onnxruntime_takes_the_cores_it_may_use_and_pins_none(monkeypatch):
    monkeypatch.setattr("efficientformer.runtime.engines.available_cores", lambda: 3)
    for threads, used in ((None, 3), (1, 1)):
        options = OnnxRuntimeEngine(FILE, threads=threads)._session.get_session_options()
        assert options.intra_op_num_threads == used


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_streams_serve_threads_at_once(name):
    engine = open_engine(FILE, name, precision="fp32", streams=2)
    batches = [pictures(4, seed) for seed in range(12)]
    expected = [engine.run(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(engine.run, batches), expected, strict=True):
            np.testing.assert_array_equal(found, right)


def test_results_are_the_callers_own():
    engine = open_engine(FILE, "openvino")
    first = engine.run(pictures(2, 1))
    kept = first.copy()
    engine.run(pictures(2, 2))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(
    ("engine", "precision", "error", "text"),
    [
        ("openvnio", "auto", UsageError, "Did you mean openvino"),
        ("auto", "fp31", UsageError, "'fp32'"),
        ("onnxruntime", "bf16", EngineError, "does not compute in bf16"),
        ("onnxruntime", "int8", EngineError, "efficientformer quantize"),
        ("openvino", "int8", EngineError, "efficientformer quantize"),
    ],
)
def test_what_cannot_be_done_is_refused(engine, precision, error, text):
    with pytest.raises(error, match=text):
        open_engine(FILE, engine, precision=precision)


def test_an_int8_network_whose_remainder_openvino_cannot_run_in_half_precision_runs_it_in_single():
    """As on processors with AMX; where single precision fails too, or the file is not quantised, that is an error."""

    def engine(file, compiling):
        opened = open_engine(file, "openvino", threads=1)
        opened.options["INFERENCE_PRECISION_HINT"] = "bf16"
        opened._core = Mock(compile_model=Mock(side_effect=compiling(opened._core.compile_model)))
        return opened

    def half_fails(real):
        def compile_model(model, device, options):
            if options["INFERENCE_PRECISION_HINT"] != "f32":
                raise RuntimeError("No suitable implementations")
            return real(model, device, options)

        return compile_model

    quantised = FILE.with_name(f"{FILE.stem}-int8.onnx")
    found = engine(quantised, half_fails).run(pictures(2))
    in_single = open_engine(quantised, "openvino", threads=1)
    in_single.options["INFERENCE_PRECISION_HINT"] = "f32"
    np.testing.assert_allclose(found, in_single.run(pictures(2)), atol=1e-4)
    for file, compiling in ((FILE, half_fails), (quantised, lambda _: Mock(side_effect=RuntimeError("broken")))):
        with pytest.raises(EngineError, match="cannot run a batch of shape"):
            engine(file, compiling).run(pictures(2))


def test_a_quantised_file_runs_in_int8_only(reference):
    manifest = type("M", (), {"provenance": {"precision": "int8", "weight_bits": "7"}})()
    assert settle_precision("auto", manifest, ("bf16", "fp32"), "X") == "int8"
    with pytest.raises(EngineError, match="cannot run in fp32"):
        settle_precision("fp32", manifest, ("bf16", "fp32"), "X")


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_files_that_are_no_networks(name, tmp_path, capfd):
    bad = tmp_path / "bad.onnx"
    for content in (b"no network", b"", FILE.read_bytes()[:100_000]):
        bad.write_bytes(content)
        with pytest.raises(EngineError, match=r"bad\.onnx"):
            open_engine(bad, name)
    with pytest.raises(EngineError, match=r"none\.onnx"):
        open_engine(Path(tmp_path / "none.onnx"), name)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["auto", "openvino", "onnxruntime"])
@pytest.mark.parametrize("numbers", [{"threads": 0}, {"threads": -1}, {"streams": 0}, {"threads": 1.5}])
def test_numbers_of_threads_and_streams_are_from_1(name, numbers):
    with pytest.raises(UsageError, match="a whole number from 1"):
        open_engine(FILE, name, **numbers)
    with pytest.raises(UsageError, match="a whole number from 1"):
        Classifier(engine=name, **numbers)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_batch_that_cannot_be_run(name):
    with pytest.raises(EngineError, match=r"cannot run a batch of shape \[2, 1, 32, 32\]"):
        open_engine(FILE, name).run(pictures(2)[:, :1])


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_file_that_was_replaced_is_not_mixed_with_the_one_that_is_open(name, tmp_path):
    path = Path(shutil.copy(FILE, tmp_path / "network.onnx"))
    engine = open_engine(path, name, precision="fp32", threads=2)
    assert engine.for_many().streams == 2
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(EngineError, match="changed or removed"):
        engine.for_many()


def test_a_missing_engine_names_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"efficientformer\[openvino\]"):
        open_engine(FILE, "openvino")


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_damaged_engine_is_an_error_that_says_what_to_do(monkeypatch, tmp_path, engine):
    break_import(monkeypatch, tmp_path, engine)
    with pytest.raises(EngineError, match=f"{engine} cannot be imported; found built for another numpy.*install it"):
        open_engine(FILE, engine)


def test_an_openvino_without_its_plugin_is_an_error_that_says_what_to_do(monkeypatch):
    without_plugin(monkeypatch)
    with pytest.raises(EngineError, match=r"OpenVINO does not work here.*CPU is not registered.*Install it anew"):
        open_engine(FILE, "openvino")


@pytest.mark.parametrize("spoil", [without_plugin, without_compiler])
def test_what_cannot_run_a_file_leaves_it_to_the_other_engine(monkeypatch, spoil):
    spoil(monkeypatch)
    with pytest.warns(UserWarning, match="ONNX Runtime .* runs instead: .*OpenVINO"):
        classify = FileClassifier(FILE)
    assert (classify.key, classify(PHOTO).name) == ("onnxruntime", "cat")


def test_what_no_engine_runs_is_told_of_as_by_the_first(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no network")
    with pytest.raises(EngineError, match="OpenVINO cannot open"):
        open_engine(tmp_path / "bad.onnx")
    with pytest.raises(PrecisionError, match="not quantised"):
        open_engine(FILE, precision="int8")
