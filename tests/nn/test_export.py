from __future__ import annotations

import os
import signal
import warnings
import zipfile
from collections import OrderedDict, namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.mutated_files import in_child
from spectrim.errors import ExportError
from spectrim.nn import export
from spectrim.nn.checkpoint import save
from spectrim.nn.export import export_onnx, export_program
from spectrim.selection.plan import Plan
from spectrim.train import resume
from tests.nn.layers import ConvNet, Wrapped, close
from tests.nn.nets import CHOICES, compressed

# torch and its exporters warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
EXPORTERS = {"program": (export_program, "model.pt2"), "onnx": (export_onnx, "model.onnx")}


@pytest.fixture(params=EXPORTERS)
def exporter(request, tmp_path):
    if request.param == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    function, name = EXPORTERS[request.param]
    return function, tmp_path / name


def read(path):
    """All bytes of a file, of an archive those of its members."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


def loaded(path):
    """Runs what lies in a file on tensors by name."""
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()
        return lambda x=None, **inputs: program(x) if x is not None else program(**inputs)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda **inputs: torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])


@pytest.fixture
def net():
    model = compressed(ConvNet(), CHOICES)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, 3, 6, 6) * 2 + 1)
    return model


def test_files_compute_what_the_model_computes_at_batch_sizes_not_seen(exporter, net):
    write, path = exporter
    gap = write(net, torch.randn(4, 3, 8, 8), path)
    assert 0 <= gap < 1e-4
    assert net.training
    assert str(Path(__file__).parent).encode() not in read(path), "the source's path is told"
    run = loaded(path)
    net.eval()
    for size in (1, 2, 5, 7):
        x = torch.randn(size, 3, 8, 8)
        with torch.no_grad():
            assert close(run(x=x), net(x), 1e-4)


class _Parts(nn.Module):
    """Four samples at a time, to save memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.layer(part) for part in x.split(4)])


class _Many(_Parts):
    """Another way for many samples."""

    def forward(self, x):
        y = self.layer(x)
        return y - y.mean(0) if len(x) > 4 else y


@pytest.mark.parametrize("model", [_Parts(), _Many()], ids=["parts", "many"])
@pytest.mark.parametrize("samples", [2, 8])
def test_what_depends_on_how_many_samples_there_are_is_refused(exporter, model, samples: int):
    write, file = exporter
    example = torch.randn(samples, 4)
    with pytest.raises(ExportError, match=r"differs from the model|dynamic_batch=False"):
        write(model.eval(), example, file)
    assert not Path(file).exists()
    assert write(model, example, file, dynamic_batch=False) < 1e-4
    assert close(loaded(file)(x=example), model(example).detach(), 1e-4)


@pytest.mark.parametrize("tolerance", ["1e-3", -1, float("nan"), True])
def test_a_tolerance_is_a_number(exporter, tolerance):
    write, file = exporter
    with pytest.raises(ValueError, match="tolerance is .*: expected a number of at least 0"):
        write(ConvNet().eval(), torch.randn(2, 3, 8, 8), file, tolerance=tolerance)


@pytest.mark.slow
def test_what_exporters_say_of_themselves_and_of_others_is_dropped(exporter, caplog):
    write, file = exporter
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        write(ConvNet().eval(), torch.randn(2, 3, 8, 8), file)
    assert not [each for each in said if issubclass(each.category, FutureWarning | DeprecationWarning)]
    assert not [record for record in caplog.records if record.name.startswith("torch.onnx")]


@pytest.mark.table(every=2)
def test_a_fixed_batch_size(exporter, net):
    write, path = exporter
    assert write(net, torch.randn(1, 3, 8, 8), path, dynamic_batch=False) < 1e-4
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert close(loaded(path)(x=x), net.eval()(x), 1e-4)


class Words(nn.Module):
    """Keyword inputs in another order than a batch may have them, one of them optional; a structured output."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, ids, mask, scale=None, unused=None):
        x = self.embed(ids) * mask.unsqueeze(-1)
        if scale is not None:
            x = x * scale[:, None, None]
        x = x.sum(1)
        return OrderedDict(logits=self.head(x), masked=(x > 0, torch.where(x > 0, 0.0, -torch.inf)))


SCALED = [("program", False), ("program", True), pytest.param("onnx", True, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("exporter", "scaled"), SCALED, indirect=["exporter"])
def test_inputs_given_as_a_mapping(exporter, scaled):
    write, path = exporter
    model = Words().eval()

    def batch(size):
        given = {"mask": torch.rand(size, 6), "ids": torch.randint(20, (size, 6))}
        return {"scale": torch.rand(size), **given} if scaled else given

    assert write(model, batch(3), path) < 1e-4
    x = batch(5)
    given = loaded(path)(**x)
    with torch.no_grad():
        assert close(given if isinstance(given, torch.Tensor) else given["logits"], model(**x)["logits"], 1e-4)


Batch = namedtuple("Batch", "image label")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exporter", "example"),
    [
        ("program", lambda x: (x, torch.arange(4))),
        ("program", lambda x: Batch(x, torch.arange(4))),
        ("onnx", lambda x: Batch(x, torch.arange(4))),
    ],
    indirect=["exporter"],
)
def test_examples_with_labels(exporter, example):
    write, path = exporter
    assert write(Wrapped(nn.Linear(3, 2)), example(torch.randn(4, 3)), path) < 1e-4


@pytest.mark.slow
class Waves(Wrapped):
    def forward(self, x):
        y = self.layer(x)
        return torch.complex(y, y.flip(-1))


class Noisy(Wrapped):
    def forward(self, x):
        y = self.layer(x)
        return y + torch.randn_like(y)


@pytest.mark.parametrize("net", [Waves, Noisy])
def test_outputs_that_are_complex_or_drawn_are_compared(net, tmp_path):
    example, path = torch.randn(4, 6), tmp_path / "model.pt2"
    model = net(nn.Linear(6, 3)).eval()
    assert export_program(model, example, path) < 1e-5
    torch.manual_seed(5)
    wanted = model(example)
    torch.manual_seed(5)
    assert torch.allclose(loaded(path)(example), wanted)


def test_onnx_has_the_two_parts_of_complex_outputs(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    example, path = torch.randn(4, 6), tmp_path / "model.onnx"
    model = Waves(nn.Linear(6, 3)).eval()
    export_onnx(model, example, path)
    assert torch.allclose(loaded(path)(x=example), torch.view_as_real(model(example)), atol=1e-5)


@pytest.mark.table(every=2)
def test_an_input_that_the_model_does_not_use(exporter):
    write, path = exporter
    batch = {"ids": torch.randint(20, (3, 6)), "unused": torch.rand(3), "mask": torch.rand(3, 6)}
    assert write(Words(), batch, path) < 1e-4


def wrong(monkeypatch, change):
    """Exports another function than the model."""
    traced = export._traced

    class Changed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return change(self.model(x))

    monkeypatch.setattr(export, "_traced", lambda model, *rest: traced(Changed(model), *rest))


@pytest.mark.parametrize(
    ("exporter", "change", "message"),
    [
        ("program", lambda y: y * 1.1, "differs from the model by"),
        ("program", lambda y: y / 0 * 0, "differs from the model by inf"),
        ("program", lambda y: y[:, :2], "returns shape"),
        ("program", lambda y: (y, y), "returns 2 tensors, the model 1"),
        # One function compares, whatever the format.
        pytest.param("onnx", lambda y: y * 1.1, "differs from the model by", marks=pytest.mark.slow),
        pytest.param("onnx", lambda y: (y, y), "returns 2 tensors, the model 1", marks=pytest.mark.slow),
    ],
    indirect=["exporter"],
)
def test_a_file_that_computes_something_else_is_not_kept(exporter, monkeypatch, change, message):
    write, path = exporter
    model = Wrapped(nn.Linear(3, 4)).train()
    wrong(monkeypatch, change)
    path.write_bytes(b"a good file")
    with pytest.raises(ExportError, match=message):
        write(model, torch.randn(2, 3), path)
    assert path.read_bytes() == b"a good file"
    assert list(path.parent.iterdir()) == [path]
    assert model.training


@pytest.mark.slow
def test_a_file_that_cannot_be_run_is_not_kept(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    def fail(*_, **__):
        raise onnxruntime.capi.onnxruntime_pybind11_state.Fail("no kernel")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(ExportError, match="no kernel"):
        export_onnx(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_the_tolerance_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_difference", lambda *_: 0.01)
    given = nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3), tmp_path / "model.pt2"
    with pytest.raises(ExportError, match="by 1.00e-02 of its largest output .allowed 5e-03"):
        export_program(*given, tolerance=0.005)
    assert not list(tmp_path.iterdir())
    assert export_program(*given, tolerance=0.02) == 0.01


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if float(x.sum()) > 0 else x


def test_a_model_that_cannot_be_exported_says_so(exporter):
    write, path = exporter
    with pytest.raises(ExportError, match="Branching cannot be exported with a dynamic batch"):
        write(Branching(), torch.randn(2, 3), path)
    assert not path.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits a child's files")
def test_a_full_disk_is_an_error_of_the_file_and_ends_no_process(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")

    def work() -> dict[str, str]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        plan = Plan((), {}, {})
        found = {}
        for name, write in {
            "model.pt2": lambda path: export_program(nn.Linear(4, 3).eval(), torch.zeros(2, 4), path),
            "model.safetensors": lambda path: save(nn.Linear(40, 30), plan, path),
            "run": lambda path: resume.write_checkpoint(path, {"a": torch.zeros(100)}, {}),
        }.items():
            try:
                write(tmp_path / name)
            except OSError as error:
                found[name] = str(error)
        return found

    found = in_child(work)
    assert set(found) == {"model.pt2", "model.safetensors", "run"}
    assert all(name in text and "cannot be written" in text for name, text in found.items())
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    class Run(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("it was run")

    for write in (export_program, export_onnx):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            write(Run(), torch.zeros(2, 2), tmp_path / "none" / "net")
        with pytest.raises(IsADirectoryError, match="it is a folder"):
            write(Run(), torch.zeros(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("example", "says"),
    [
        (torch.ones(0, 4), "the example is empty: it holds no sample; give a batch"),
        (torch.full((2, 4), float("nan")), "the model's own outputs hold NaN on the example"),
    ],
)
def test_examples_that_prove_nothing_are_refused(example, says, exporter):
    export_to, path = exporter
    with pytest.raises(ExportError, match=says):
        export_to(nn.Sequential(nn.Linear(4, 2)), example, path)
    assert not path.exists()
