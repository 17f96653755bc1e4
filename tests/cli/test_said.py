"""What the command line says of input that cannot be used, and of what it measured."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import spectrim.cli
from spectrim.cli.data import load_data
from spectrim.cli.models import check_reference, load_model
from spectrim.cli.references import UsageError, call_reference, parse
from spectrim.cli.results import _idle
from spectrim.cli.unfinished import make_folder
from spectrim.cli.weights import read_weights
from spectrim.nn.agreement import agreement
from spectrim.pipeline import Result, compress
from spectrim.selection.plan import Plan

TUNED = ("compress", "nets:tiny", "--data", "nets:batches", "--train", "nets:batches", "--epochs", "1", "-o", "small")


def compressed() -> Result:
    import nets

    return compress(nets.tiny(), calibration=nets.batches(), budget="macs=50%")


@functools.cache
def planned() -> str:
    return compressed().plan.to_json()


def test_sigterm_stops_a_command_and_means_afterwards_what_it_did(run, monkeypatch: pytest.MonkeyPatch):
    before = signal.getsignal(signal.SIGTERM)
    assert run("doctor").exit_code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr("nets.tiny", lambda: os.kill(os.getpid(), signal.SIGTERM), raising=False)
    stopped = run("compress", "nets:tiny", "--data", "nets:batches", "--budget", "macs=50%", "-o", "small", code=143)
    assert "spectrim: stopped" in stopped.stderr
    assert not Path("small").exists()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("error", [ImportError, None])
def test_a_stop_that_a_library_swallows_is_one(run, monkeypatch: pytest.MonkeyPatch, number, code: int, error):
    import nets

    made = nets.tiny

    def swallowing():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            if error is not None:
                raise error("initialization failed") from None
        return made()

    monkeypatch.setattr("nets.tiny", swallowing)
    # A shell that starts the tests in the background has them ignore SIGINT.
    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        assert "spectrim: stopped" in run("profile", "nets:tiny", "--input", "1x8x8", code=code).stderr
    finally:
        signal.signal(number, before)


def test_signals_that_are_ignored_stay_so(run, monkeypatch: pytest.MonkeyPatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import nets

        made = nets.tiny
        monkeypatch.setattr("nets.tiny", lambda: (os.kill(os.getpid(), signal.SIGINT), made())[1])
        assert "head" in run("profile", "nets:tiny", "--input", "1x8x8").stdout
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stop_while_the_program_is_loaded_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spectrim.cli.app.main", stopped)
    with pytest.raises(SystemExit) as caught:
        spectrim.cli.main()
    assert (caught.value.code, capsys.readouterr().err) == (130, "spectrim: stopped\n")


def test_agreement_is_that_of_the_fine_tuned_model(run):
    import nets

    from spectrim.cli.models import load_compressed

    found = run.json(*TUNED, "--budget", "macs=50%")
    wanted = agreement(nets.tiny(), load_compressed("nets:tiny", "small/model.safetensors"), nets.batches())
    assert wanted is not None
    assert found["agreement"]["error"] == pytest.approx(wanted.error)
    assert not found["agreement"]["held_out"]
    before = compressed().report.agreement
    assert before is not None
    assert before.error != pytest.approx(wanted.error)
    page = Path("small/report.html").read_text(encoding="utf-8")
    assert f"{wanted.error:.2%}" in page
    assert "held-out calibration samples" not in page


def test_a_stopped_fine_tuning_says_what_the_file_is(run, monkeypatch: pytest.MonkeyPatch):
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spectrim.cli.shrinking.fine_tune", stopped)
    said = run(*TUNED, "--budget", "macs=50%", code=130).stderr
    assert "small/model.safetensors is the network before fine-tuning; the same call goes on" in said


def test_a_budget_that_limits_nothing_is_told(run):
    arguments = ("compress", "nets:tiny", "--input", "1x8x8", "--no-report", "--budget")
    assert "limits nothing" in " ".join(run.json(*arguments, "macs=100%")["notes"])
    assert "limits nothing" not in " ".join(run.json(*arguments, "macs=90%")["notes"])
    plan = Plan((), {"latency": 0.25}, {"latency": 0.5}, budget={"latency": 5.0})
    assert _idle(plan) == ["The budget of 5.00 ms for latency limits nothing: the dense network takes 0.500 ms."]
    assert "'150%' is more than the dense network" in run(*arguments, "macs=150%", code=2).stderr


def junk(path: Path) -> None:
    path.write_bytes(bytes(range(7, 256)))


def truncated(path: Path) -> None:
    torch.save(nn.Linear(8, 8).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])


def whole_model(path: Path) -> None:
    torch.save(nn.Linear(2, 2), path)


@pytest.mark.parametrize(
    ("name", "write", "why"),
    [
        ("junk.pt", junk, "not a checkpoint that torch.save wrote"),
        ("half.pt", truncated, "is damaged, or a part of it is missing .*: copy it again, or save it again$"),
        (
            "model.pt",
            whole_model,
            r"whole model .*\(torch.nn.modules.linear.Linear\).*save model.state_dict\(\) instead",
        ),
    ],
)
def test_weights_that_are_none(tmp_path: Path, name: str, write: Callable[[Path], None], why: str):
    write(tmp_path / name)
    with pytest.raises(UsageError, match=why) as caught:
        read_weights(tmp_path / name)
    assert "weights_only" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("evaluate", "hf:./missing", "--input", "3"), "'hf:./missing': there is no such folder"),
        (("evaluate", "nets:tiny?width=x", "--input", "1x8x8"), "'nets:tiny?width=x' raised TypeError"),
        (("evaluate", "nets:tiny", "--data", "folder"), "write imagefolder:folder"),
        (("evaluate", "nets:tiny", "--data", "file"), "'file' is a file: write a function"),
        (
            ("compress", "nets:tiny", "--input", "1x8x8", "-b", "macs=100%", "-o", "file"),
            "'file' is a file, not a folder",
        ),
        (("compress", "nets:tiny", "--input", "1x8x8", "-b", "macs=-5%"), "units k, M, G, T; it must be positive"),
    ],
)
def test_what_cannot_be_used_is_named_with_the_cure(run, arguments: tuple[str, ...], why: str):
    Path("folder").mkdir()
    Path("file").touch()
    assert why in run(*arguments, code=2).stderr


def test_labels_that_are_no_classes_are_refused_before_anything_is_written(run, monkeypatch: pytest.MonkeyPatch):
    import nets

    monkeypatch.setattr(nets, "far", lambda: [(x, y + 100) for x, y in nets.batches()], raising=False)
    said = run("compress", "nets:tiny", "--data", "nets:batches", "-b", "macs=50%", "--test", "nets:far", code=2).stderr
    assert "labels are int64 such as" in said
    assert not Path("compressed").exists()


def test_a_factory_that_raises_is_told_in_one_sentence():
    def fails() -> None:
        raise RuntimeError("no\nweights")

    with pytest.raises(UsageError, match="'a:b' raised RuntimeError: no weights"):
        call_reference(fails, parse("a:b"), "model")


def test_results_cannot_lie_in_a_file(tmp_path: Path):
    from spectrim.cli.common import Output

    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file' is a file, not a folder"):
        make_folder(Output(), tmp_path / "file" / "inner")


def test_what_python_would_be_given_is_said_in_terms_of_options(run):
    Path("two.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Two(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.a = nn.Linear(4, 4)\n\n    def forward(self, x, y):\n"
        "        return self.a(x) + y\n\n\ndef batches():\n    return [(torch.randn(8, 4),)]\n",
        encoding="utf-8",
    )
    said = run("compress", "./two.py:Two", "--data", "./two.py:batches", "-o", "small", "--budget", "macs=50%", code=1)
    assert "forward needs 2 inputs" in said.stderr
    assert (
        "let MODEL name a module of yours whose forward(batch) runs the network, as docs/model-references.md"
        in said.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("-b", "macs=50%", "--input", "0x8x8"), r"write the sizes of one sample, as 3x224x224\.$"),
        (("-b", "macs=50%", "--input", "-1x8x8"), r"write the sizes of one sample, as 3x224x224\.$"),
        (("-b", "macs=50%", "--input", "1,8,8"), "Did you mean 1x8x8"),
        (("-b", "macs=50%", "--input", "1x8x9999999999"), r"has 8e\+10 numbers: write the sizes of one sample"),
        (("-b", "macs=50%", "--input", "1x8x8", "--rows", "9" * 20), "--rows 9{20} is too large: write at most 2,1"),
        (("-b", "macs=50%", "--input", "1x8x8", "--batch", "9" * 20), "--batch 9{20} is too large"),
        (("-b", "macs=50%", "--input", "1x8x8", "--threads", "9999"), "--threads '9999'"),
        (("-b", "macs=50%", "--data", "digits?limit=-1"), "limit=-1 must be a number of samples, or 0 for all"),
        (("-b", "macs=50%", "--data", "digits?seed=-1"), "seed=-1 must lie between 0"),
        (("-b", "macs=50%", "--data", "digits?normalise=nan/1"), "normalise=nan/1 must be"),
        (("-b", "macs=50%", "--input", "1x8x8", "--device", "gpu"), "Did you mean 'cuda'"),
        (("-b", "macs=50%", "--input", "1x8x8", "--lr", "0.1"), "--lr 0.1 is for fine-tuning: give --train too"),
        (("-b", "macs=50%", "--input", "1x8x8", "--epochs", "3"), "--epochs 3 is for fine-tuning"),
        (("-b", "macs=50%", "--input", "1x8x8", "--cost", "joules"), "write NAME=package.module:function"),
        (("-b", "macs=50%", "--input", "1x8x8", "-d", "digits"), "no data: leave it out, or --data digits"),
        (("-b", "macs=50%", "--input", "1x8x8", "-o", ""), "nothing stands behind -o"),
        (("-b", "macs=50%", "--input", "1x8x8", "--out="), "nothing stands behind --out"),
        (("--input", "1x8x8", "--plan", "run"), "'run' is not a file: write run/plan.json"),
        (("--input", "1x8x8", "--plan", "run/result.json"), "'run/result.json' is no plan: write run/plan.json"),
        (("-b", "macs=50%", "--input", "1x8x8", "--groups", "run/resultt.json"), "Did you mean 'run/result.json'"),
    ],
)
def test_mistakes_are_told_with_the_cure_before_torch(run, arguments: tuple[str, ...], why: str):
    Path("run").mkdir()
    Path("run/plan.json").write_text('{"entries": []}')
    Path("run/result.json").write_text("{}")
    said = run("compress", "nets:tiny", *arguments, code=2).stderr.strip()
    assert re.search(why, said), said
    assert said.count("\n") == 0
    assert not Path("compressed").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("evaluate", "nets:tiny", "--input", "1x8x8"), "with --compare: give that too, or leave --weights out"),
        (("export", "nets:tiny", "--input", "1x8x8", "-o", "net.pt2"), "leave the other out"),
    ],
)
def test_weights_that_nothing_would_read_are_refused(run, arguments: tuple[str, ...], why: str):
    import nets
    from safetensors.torch import save_file

    save_file(nets.tiny().state_dict(), "net.safetensors", {"plan": "{}"})
    both = ("-w", "net.safetensors", "-c", "net.safetensors")
    said = run(*arguments, *both, code=2).stderr
    assert "--weights net.safetensors does not combine with --checkpoint net.safetensors" in said
    assert why in said


@pytest.mark.parametrize("made", ["x", "(x, torch.zeros(8))", "{'x': x}", "'photos'", "torch.nn.Sequential()"])
def test_what_is_no_list_of_batches_is_told(made: str):
    Path("made.py").write_text(f"import torch\n\n\ndef data():\n    x = torch.zeros(8, 3)\n    return {made}\n")
    with pytest.raises(UsageError, match=r"returned an? .*, not an iterable of batches: return a list of them"):
        load_data("./made.py:data")
    Path("made.py").unlink()


def test_a_network_in_place_of_a_function_is_told():
    Path("held.py").write_text("from torch import nn\n\nmodel = nn.Linear(2, 2)\n")
    with pytest.raises(UsageError, match="model is a Linear itself: write a function that returns it"):
        load_model("./held.py:model")


def test_what_the_memory_does_not_hold_is_told(run, monkeypatch: pytest.MonkeyPatch):
    from spectrim.cli import subject

    def full(*args: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 119997600012 bytes.")

    monkeypatch.setattr(subject, "random_input", full)
    said = run("compress", "nets:tiny", "--input", "1x8x8", "-b", "macs=50%", code=1).stderr
    assert "there is not enough memory for 119997600012 bytes: give fewer or smaller samples (--input" in said
    assert not Path("compressed").exists()


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    for name in ("HF_HUB_OFFLINE", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"127\.0\.0\.1 cannot be reached .* write hf:FOLDER"):
        check_reference("hf:somebody/nothing")


def test_what_was_fetched_before_is_loaded_without_a_connection(monkeypatch: pytest.MonkeyPatch):
    transformers = pytest.importorskip("transformers")
    asked: list[object] = []

    def from_pretrained(name: str, **options: object) -> None:
        asked.append(options.get("local_files_only"))
        raise OSError("as far as this")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    monkeypatch.setattr("spectrim.cli.models._stored", lambda: ["somebody/tiny"])
    for out_of_reach in ("it is not there", ""):
        monkeypatch.setattr("spectrim.cli.models._out_of_reach", lambda seconds, why=out_of_reach: why)
        with pytest.raises(UsageError, match="as far as this$"):
            load_model("hf:somebody/tiny")
    assert asked == [True, None]


def test_the_program_alone_shows_its_help(run):
    said = run(code=2)
    assert "\n\nCommands:\n" in said.stderr
    assert "error" not in said.stderr
    assert said.stdout == ""


def test_errors_of_the_system_are_told_without_their_number(run, tmp_path: Path):
    said = run("compress", "nets:tiny", "--input", "1x8x8", "-b", "macs=50%", "-o", "/proc/none", code=1).stderr
    assert said.startswith("spectrim: error: '/proc/none': nothing can be written there: ")
    assert "name another place" in said


def test_a_mask_that_no_batch_holds_is_told_before_the_work(run):
    said = run("compress", "nets:tiny", "--data", "nets:batches", "-b", "macs=50%", "--mask", "pad", code=2).stderr
    assert "--mask 'pad': the batches of --data hold no tensors with names; leave it out, or name one" in said
    assert "calibrate" not in said


@pytest.mark.parametrize("command", ["compress", "sweep", "profile"])
def test_nan_in_padding_that_a_mask_tells_of_counts_nowhere(run, command: str):
    said = [command, "nets:Marked", "--data", "nets:not_numbers_in_padding", "--mask", "keep"]
    document = run.json(*said, *([] if command == "profile" else ["-b", "macs=60%", "-o", "made"]))
    numbers = json.dumps(document)
    assert "NaN" not in numbers
    assert "Infinity" not in numbers


def test_costs_are_those_of_the_largest_sample_wherever_they_are_told(run):
    document = run.json("compress", "nets:perceptron", "--data", "nets:of_several_lengths", "-b", "macs=60%", "-o", "o")
    [counted] = [row for row in document["comparison"]["rows"] if row["metric"] == "MACs"]
    assert document["dense_costs"]["macs"] == counted["dense"] == 9 * (8 * 16 + 16 * 4)
    assert document["costs"]["macs"] == counted["compressed"]


def test_a_stop_before_there_is_anything_promises_nothing(run, monkeypatch: pytest.MonkeyPatch):
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nets.tiny", stopped, raising=False)
    assert run("profile", "nets:tiny", code=130).stderr == "spectrim: stopped\n"


@pytest.mark.parametrize(
    ("option", "value"),
    [("--weights", "a\0b.pt"), ("--out", "a\0b"), ("--data", "a\0b.py:batches"), ("--groups", "\0"), ("--skip", "\0")],
)
def test_a_nul_is_refused_in_every_text(run, option: str, value: str):
    arguments = ["compress", "./nets\0.py:tiny" if option == "--skip" else "nets:tiny", "--budget", "macs=50%"]
    assert "holds a NUL" in run(*arguments, option, value, code=2).stderr
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("command", "taken"),
    [
        (("compress", "--input", "1x8x8", "-b", "macs=50%"), "report.html/"),
        (("sweep", "-d", "nets:batches", "--points", "0.5"), "run.json/"),
        (("sweep", "-d", "nets:batches", "--points", "0.5"), "macs-50pct/model.safetensors/"),
        (("sweep", "-d", "nets:batches", "--points", "0.5"), "macs-50pct"),
    ],
)
def test_what_lies_where_a_result_is_to_be_is_named_before_the_work(run, command: tuple[str, ...], taken: str):
    place = Path("out") / taken
    place.parent.mkdir(parents=True, exist_ok=True)
    if taken.endswith("/"):
        place.mkdir()
    else:
        place.touch()
    name, *options = command
    said = run(name, "nets:tiny", *options, "-o", "out", code=2).stderr
    assert f"{str(place)!r}: there is a {'folder where a file' if place.is_dir() else 'file where a folder'}" in said


@pytest.mark.parametrize("command", ["compress", "profile", "evaluate", "export"])
def test_a_shape_that_the_model_does_not_take_is_quoted(run, command: str):
    more = {"compress": ["-b", "macs=50%"], "export": ["-o", "net.pt2"]}.get(command, [])
    said = run(command, "nets:tiny", "--input", "3x8x8", *more, code=2).stderr
    assert said.count("\n") == 1
    assert "--input 3x8x8: Tiny cannot be run on it and raises RuntimeError" in said
    assert "without the batch, as 3x224x224" in said


@pytest.mark.parametrize("option", ["--data", "--train", "--test"])
def test_batches_that_the_model_does_not_take_are_told_by_their_option(run, option: str):
    given = {"--data": "nets:batches", "--train": "nets:batches", "--test": "nets:batches", option: "nets:coloured"}
    asked = [each for pair in given.items() for each in pair]
    said = run("compress", "nets:tiny", *asked, "-b", "macs=50%", "-o", "small", code=1).stderr
    assert re.search("(--t|data ').*: Tiny cannot be run on it and raises RuntimeError", said)
    assert not Path("small").exists()


def test_the_demo_refuses_what_cannot_be_met_before_it_trains(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("spectrim.train.fine_tune", lambda *_, **__: pytest.fail("something was trained"))
    said = run("demo", "--width", "4", "-b", "macs=0.1%", "-o", "small", code=3).stderr
    assert "the lowest reachable is" in said
    assert not Path("small").exists()


def test_a_plan_that_needs_samples_asks_for_them(run):
    run("compress", "nets:tiny", "-d", "nets:batches", "-b", "macs=50%", "-o", "small", "--no-report")
    call = ("compress", "nets:tiny", "--input", "1x8x8", "--plan", "small/plan.json", "-o", "other")
    said = " ".join(run(*call, code=2).stderr.split())
    assert "--plan small/plan.json needs samples to carry it out: give --data (site" in said
    assert "calibrate(" not in said
    assert not Path("other/model.safetensors").exists()


@pytest.mark.parametrize("edit", ["none", "cut", "rank", "costs"])
def test_an_edited_plan_is_carried_out_with_the_costs_that_its_choices_have(run, edit: str):
    record = json.loads(planned())
    changed = next(entry for entry in record["entries"] if entry["choice"]["kind"] == "low_rank")
    if edit == "cut":
        record["entries"].remove(changed)
    elif edit == "rank":
        changed["choice"]["settings"]["rank"] = 1
    elif edit == "costs":
        record["costs"]["macs"] = 7.0
    Path("edited.json").write_text(json.dumps(record), encoding="utf-8")
    found = run.json("compress", "nets:tiny", "-d", "nets:batches", "--plan", "edited.json", "-o", "out", "--no-report")
    told = {each["metric"]: each["compressed"] for each in found["comparison"]["rows"]}
    assert found["costs"]["macs"] == told["MACs"]
    assert found["costs"]["parameters"] == told["parameters"]
    assert ("counted anew" in " ".join(found["notes"])) is (edit != "none")


def test_batches_beyond_all_memory_are_refused_before_they_are_made():
    from spectrim.cli import subject

    model = nn.Flatten().eval()
    most = "--batch 2147483647 is too large: of samples of 64 numbers write at most 33,554,431"
    with pytest.raises(UsageError, match=most):
        subject.random_input("1x8x8", 2**31 - 1, "cpu", model)
    with pytest.raises(UsageError, match=most):
        subject.first_batch([torch.zeros(4, 1, 8, 8)], 2**31 - 1, "digits", model)
    assert subject.random_input("1x8x8", 3, "cpu", model).shape == (3, 1, 8, 8)
