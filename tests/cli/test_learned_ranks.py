from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectrim.cli.learning import spread_schedule
from spectrim.cli.options import LearnedRanksOptions
from spectrim.errors import SpectrimError
from spectrim.methods import ActivationSVD, WeightSVD
from spectrim.report import compare
from spectrim.selection.budget import Budget
from spectrim.selection.plan import Plan
from spectrim.selection.trajectory import Trajectory
from spectrim.train import LearnedRanks, Recipe, Schedule, learn_ranks

BATCHES = ("--train", "nets:batches", "--test", "nets:batches")
LEARN = ("compress", "nets:tiny", "--method", "learned-ranks:rank_epochs=2,c_steps=4", *BATCHES, "--epochs", "1")
PATH = ("path", "nets:tiny", *BATCHES, "--rank-epochs", "2", "--epochs", "1", "--c-steps", "4")


def learn(options: str, *arguments: str) -> tuple[str, ...]:
    return ("compress", "nets:tiny", "--method", f"learned-ranks:{options}", *BATCHES, *arguments)


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_compress_meets_a_budget_and_writes_the_course_of_the_ranks(run):
    found = run.json(*LEARN, "--budget", "macs=50%", "--budget", "parameters=60%", "--animate", "--out", "small")
    names = {"model.safetensors", "plan.json", "report.html", "ranks.json", "ranks.gif", "result.json"}
    assert {Path(file).name for file in found["files"].values()} == names
    assert Path("small/ranks.gif").read_bytes().startswith(b"GIF8")
    for cost, share in (("macs", 0.5), ("parameters", 0.6)):
        assert found["costs"][cost] <= found["budget"][cost] == share * found["dense_costs"][cost]
    trajectory = Trajectory.read("small/ranks.json")
    assert trajectory.sites == ("conv", "wide", "head")
    assert dict(trajectory.budget) == found["budget"]
    assert len(trajectory) == 4
    assert trajectory.records[-1].mu == pytest.approx(Schedule().mu(Schedule().steps - 1))
    assert all(record.costs["macs"] <= found["budget"]["macs"] for record in trajectory.records)
    assert list(found["scores"]) == ["dense", "learned ranks"]
    assert any(
        re.match(r"Ranks learned for 2 epochs in \d+ s, chosen anew 4 times \(C steps\)", note)
        for note in found["notes"]
    )
    assert any("then fine-tuned for 1 epoch" in note for note in found["notes"])
    # The file holds the network that was measured.
    again = run.json(
        "evaluate", "nets:tiny", "-c", "small/model.safetensors", "--data", "nets:batches", "--repeats", "0"
    )
    values = {row["metric"]: row["value"] for row in again["rows"]}
    assert values["accuracy"] == found["scores"]["learned ranks"]
    assert values["MACs"] == found["costs"]["macs"]


@pytest.mark.parametrize("command", ["compress", "path"])
def test_rows_of_calibration_and_what_is_data_are_as_asked_for(command, run, monkeypatch: pytest.MonkeyPatch):
    asked = {}

    def noted(*_, **options):
        asked.update(options)
        raise SpectrimError("asked")  # what is done then is the same

    monkeypatch.setattr("spectrim.cli.learning.learn_ranks", noted)
    monkeypatch.setattr("spectrim.train.budget_path", noted)
    options = {
        "compress": learn("rank_epochs=0,c_steps=1", "--epochs", "0", "--no-report"),
        "path": ("path", "nets:tiny", *BATCHES, "--rank-epochs", "0", "--epochs", "0", "--c-steps", "1"),
    }
    call = (*options[command], "-b", "macs=60%")
    run(*call, "--positions", "3", code=1)
    assert (asked["rows"], asked["positions"], asked["mask"]) == ("auto", 3, None)
    run(*call, "--rows", "100", code=1)
    assert (asked["rows"], asked["positions"]) == (100, None)


def test_networks_are_timed_by_the_runtime_that_is_asked_for(run, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("onnxruntime")
    ran = []

    def compared(*networks, runtime: str = "eager", **how):
        ran.append(runtime)
        return compare(*networks, repeats=0, **how)

    monkeypatch.setattr("spectrim.cli.subject.ready", lambda *network: None)
    monkeypatch.setattr("spectrim.cli.results.compare", compared)
    learned = learn("rank_epochs=0,c_steps=1", "--epochs", "0", "--no-report")
    run(*learned, "-b", "macs=60%", "--runtime", "onnxruntime")
    assert ran == ["onnxruntime"]


@pytest.mark.table(every=2)
@pytest.mark.parametrize(
    ("said", "energy", "method"), [(",energy=weight", "weight", WeightSVD), ("", "output", ActivationSVD)]
)
def test_options_reach_the_call_and_calibration_is_optional(run, said, energy, method):
    import nets

    options = ("--epochs", "1", "--lr", "0.01", "--multiple-of", "3", "--skip", "head")
    learned = learn("rank_epochs=2,c_steps=4,rank_lr=0.02" + said)
    run(*learned, "-b", "macs=60%", "--data", "nets:batches?samples=32", *options, "--no-report", "--out", "typed")
    called = learn_ranks(
        nets.tiny().eval(), nets.batches(), Budget(macs="60%"), calibration=nets.batches(32), skip=["head"],
        learning=Recipe(epochs=2, lr=0.02), tuning=Recipe(epochs=1, lr=0.01), schedule=spread_schedule(4),
        energy=energy, methods=[method(multiple_of=3)], progress=False,
    )  # fmt: skip
    assert Plan.read("typed/plan.json") == called.plan
    assert Trajectory.read("typed/ranks.json").records[-1].ranks == called.trajectory.records[-1].ranks
    assert same(weights("typed"), dict(called.model.state_dict()))
    assert not Path("typed/report.html").exists()


def test_c_steps_spread_the_usual_range_of_mu():
    usual = Schedule()
    assert spread_schedule(usual.steps) == usual
    for steps in (2, 5, 40):
        assert spread_schedule(steps).mu(steps - 1) == pytest.approx(usual.mu(usual.steps - 1))
        assert spread_schedule(steps).mu(0) == usual.start
    assert spread_schedule(1).steps == 1


def test_defaults_are_those_of_the_library(run):
    text = " ".join(run("path", "--help").stdout.split())
    for option, default in (("--c-steps", Schedule().steps), ("--rank-epochs", Recipe().epochs)):
        shown = text.split(f" {option} ", 1)[1].split("[default: ", 1)[1]
        assert shown.startswith((f"{default};", f"{default}]"))
    learned = LearnedRanksOptions()
    assert (learned.c_steps, learned.rank_epochs) == (Schedule().steps, Recipe().epochs)
    assert learned.cost == inspect.signature(LearnedRanks).parameters["cost"].default


@pytest.mark.slow
def test_a_multiplier_takes_the_place_of_a_budget(run):
    costs = []
    for multiplier in ("1e-06", "0.01"):
        learned = learn(f"rank_epochs=2,c_steps=4,multiplier={multiplier},cost=parameters")
        found = run.json(*learned, "--epochs", "0", "--no-report", "--out", multiplier)
        assert found["budget"] == {}
        assert not Trajectory.read(f"{multiplier}/ranks.json").budget
        assert dict(Plan.read(f"{multiplier}/plan.json").multipliers) == {"parameters": float(multiplier)}
        costs.append(found["costs"]["parameters"])
    # A parameter that is worth more loss leaves fewer of them.
    assert costs[1] < costs[0] <= found["dense_costs"]["parameters"]


@pytest.mark.slow
def test_the_report_tells_how_ranks_were_learned(run):
    text = run(*LEARN, "-b", "macs=50%", "--quiet").stdout
    assert "Ranks learned for 2 epochs" in text
    assert "Written to compressed:" in text  # files stand below by their names
    assert "  ranks.json " in text
    page = Path("compressed/report.html").read_text()
    assert "Ranks learned for 2 epochs" in page
    assert "C step" in page
    assert "Ranks while learning" in page


def test_without_epochs_ranks_are_chosen_once(run):
    found = run.json(*learn("rank_epochs=0,c_steps=4"), "-b", "macs=50%", "--epochs", "0", "--no-report")
    assert "Ranks chosen once, without learning." in found["notes"]
    assert len(Trajectory.read(found["files"]["ranks"])) == 1


@pytest.mark.slow
def test_compress_continues_from_a_checkpoint_and_from_no_other_run(run):
    arguments = (*LEARN, "-b", "macs=50%", "--no-report", "--checkpoint", "state")
    run(*arguments, "--out", "first")
    Path("state/tuning.safetensors").unlink()
    learned = Path("state/learning.safetensors").stat().st_mtime_ns
    run(*arguments, "--out", "second")
    assert same(weights("first"), weights("second"))
    assert Path("first/ranks.json").read_text() == Path("second/ranks.json").read_text()
    assert Path("state/learning.safetensors").stat().st_mtime_ns == learned  # not learned again
    other = learn("rank_epochs=2,c_steps=5,rank_lr=0.5", "--epochs", "1", "-b", "macs=50%", "--checkpoint", "state")
    error = run(*other, code=2).stderr
    assert "c_steps was 4 and is 5" in error
    assert "rank_lr was None and is 0.5" in error
    for changed, message in (
        (("--skip", "conv"), "--skip was None and is ['conv']"),
        (("--train", "nets:batches?samples=32"), "--train was 'nets:batches' and is 'nets:batches?samples=32'"),
    ):
        error = run(*arguments, *changed, code=2).stderr
        assert "'state' holds another run" in error
        assert message in error
    Path("state/run.json").write_text("[1")
    assert "run.json" in run(*arguments, code=2).stderr
    error = run(*arguments, "--checkpoint", "first/plan.json", code=2).stderr
    assert "'first/plan.json' is not a folder" in error


@pytest.mark.slow
def test_a_folder_without_checkpoints_is_free_for_any_run(run):
    Path("state").mkdir()
    Path("state/run.json").write_text("of a run that was killed before its first epoch")
    arguments = (*learn("rank_epochs=0,c_steps=4"), "--epochs", "0", "--no-report", "--checkpoint", "state")
    run(*arguments, "-b", "macs=0.1%", code=3)
    run(*arguments, "-b", "macs=50%")
    assert json.loads(Path("state/run.json").read_text())["points"] == ["macs=50%"]


@pytest.mark.slow
def test_path_writes_every_point_and_continues(run):
    budgets = ("-b", "macs=65%", "-b", "macs=50%,parameters=55%")
    found = run.json(*PATH, *budgets, "--out", "curve")
    file = json.loads(Path("curve/path.json").read_text())
    assert {key: found[key] for key in file} == file
    assert [point["asked"] for point in file["points"]] == ["macs=65%", "macs=50%,parameters=55%"]
    folders = ["curve/00-macs-65pct", "curve/01-macs-50pct-parameters-55pct"]
    dense = file["dense"]["costs"]
    assert file["points"][0]["budget"] == {"macs": 0.65 * dense["macs"]}
    for folder, point in zip(folders, file["points"], strict=True):
        assert {
            f"{folder.removeprefix('curve/')}/{name}" for name in ("model.safetensors", "plan.json", "ranks.json")
        } == set(point["files"].values())
        plan = Plan.read(f"{folder}/plan.json")
        assert dict(plan.costs) == point["costs"]
        assert all(point["costs"][cost] <= limit for cost, limit in point["budget"].items())
        assert Trajectory.read(f"{folder}/ranks.json").dense_costs == dense
        assert 0 <= point["accuracy"] <= 100
        assert point["rank_epochs"] == 2
    assert Path("curve/path.svg").read_text().lstrip().startswith("<?xml")
    model = (
        "evaluate",
        "nets:tiny",
        "-c",
        f"{folders[1]}/model.safetensors",
        "--data",
        "nets:batches",
        "--repeats",
        "0",
    )
    assert run.json(*model)["rows"][0]["value"] == file["points"][1]["accuracy"]

    before = [weights(folder) for folder in folders]
    shutil.rmtree(folders[1])
    shutil.rmtree("curve/checkpoint/01")
    Path("curve/path.json").unlink()
    first = Path("curve/checkpoint/00/learning.safetensors").stat().st_mtime_ns
    text = run(*PATH, *budgets, "-b", "parameters=50%", "--out", "curve").stdout
    assert Path("curve/checkpoint/00/learning.safetensors").stat().st_mtime_ns == first
    assert all(same(old, weights(folder)) for old, folder in zip(before, folders, strict=True))
    again = json.loads(Path("curve/path.json").read_text())
    assert again["points"][0] | {"seconds": 0} == file["points"][0] | {"seconds": 0}
    assert again["points"][1] | {"seconds": 0} == file["points"][1] | {"seconds": 0}
    assert len(again["points"]) == 3
    for word in ("dense", "macs=65%", "parameters=50%", "accuracy", "curve/path.json", "curve/path.svg"):
        assert word in text

    error = run(*PATH, "-b", "macs=60%", "--out", "curve", code=2).stderr
    assert "--budget was ['macs=65%'] and is ['macs=60%']" in error


def test_a_path_that_cannot_be_met_is_refused_before_training(run):
    document = run.json(*PATH, "-b", "macs=60%", "-b", "macs=0.1%", "--out", "curve", code=3)
    assert "the lowest reachable is" in document["error"]["message"]
    assert not Path("curve").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((*LEARN,), 2, "either --budget (as macs=50%), or a multiplier"),
        (learn("multiplier=1e-6", "-b", "macs=50%"), 2, "either --budget (as macs=50%), or a multiplier"),
        ((*LEARN, "-b", "macs=50%", "--method", "low-rank"), 2, "--method learned-ranks does not combine with another"),
        (
            learn("steps=3", "-b", "macs=50%"),
            2,
            "no option 'steps'; the options of learned-ranks are rank_epochs: a whole number",
        ),
        (learn("c_steps=0", "-b", "macs=50%"), 2, "c_steps is 0; expected 1 or more"),
        (learn("c_steps=few", "-b", "macs=50%"), 2, "c_steps is 'few'; expected a whole number"),
        (learn("rank_epochs=-1", "-b", "macs=50%"), 2, "rank_epochs is -1; expected 0 or more"),
        (("compress", "nets:tiny", "--method", "learned-ranks", "-b", "macs=50%"), 2, "give --train"),
        ((*LEARN, "-b", "macs=50%", "--plan", "some.json"), 2, "--plan some.json does not combine"),
        ((*LEARN, "-b", "macs=50%", "--selector", "greedy"), 2, "--selector greedy does not combine"),
        ((*LEARN, "-b", "macs=50%", "--guard"), 2, "--guard does not combine with --method learned-ranks"),
        (learn("cost=bytes", "-b", "macs=50%"), 2, "cost is what a multiplier is for"),
        (learn("energy=dark", "-b", "macs=50%"), 2, "energy is 'dark'; expected weight or output"),
        (learn("rank_lr=-1", "-b", "macs=50%"), 2, "rank_lr: lr=-1.0"),
        ((*LEARN, "-b", "macs=50%", "--lr", "-2"), 2, "--lr: lr=-2.0"),
        ((*LEARN, "-b", "macs=50%", "--skip", "layer9"), 2, "'layer9'"),
        ((*LEARN, "-b", "speed=2"), 2, "--budget limits 'speed'"),
        (learn("multiplier=-1"), 2, "multiplier is -1.0; expected a finite number above 0"),
        (learn("multiplier=nan"), 2, "multiplier is nan; expected a finite number"),
        (learn("multiplier=1e-6,cost=joules"), 2, "cost 'joules' is not known; choose from parameters, macs"),
        ((*LEARN, "-b", "macs=50%", "--train", "nets:triples"), 2, "--train 'nets:triples' cannot be trained on"),
        ((*LEARN, "-b", "macs=50%", "--test", "nets:unlabelled"), 2, "holds no labels"),
        ((*LEARN, "-b", "macs=0.1%"), 3, "the lowest reachable is"),
        (("compress", "nets:tiny", "--method", "magic", "-b", "macs=50%"), 2, "learned-ranks"),
        ((*PATH,), 2, "give --budget once for each point"),
        (("path", "nets:tiny", "--train", "nets:batches", "-b", "macs=50%"), 2, "give --test"),
        (("path", "nets:tiny", "--test", "nets:batches", "-b", "macs=50%"), 2, "give --train"),
        ((*PATH, "-b", "macs=50%,speed=2"), 2, "--budget limits 'speed'"),
        ((*PATH, "-b", "macs=50%,macs=60%"), 2, "limits macs twice"),
        ((*PATH, "-b", "macs=50%", "--energy", "dark"), 2, "energy is 'dark'; expected weight or output"),
        ((*PATH, "-b", "macs=50%", "--only", "layer9"), 2, "'layer9'"),
    ],
)
def test_errors_quote_what_was_typed(run, arguments: tuple[str, ...], code: int, message: str):
    result = run(*arguments, code=code)
    assert result.stdout == ""
    *_, last = (line for line in result.stderr.splitlines() if line.startswith("spectrim: error: "))
    assert message in last
    assert not Path("compressed").exists()


@pytest.mark.parametrize("given", [("--checkpoint", "state"), ("--animate",)])
def test_options_of_learned_ranks_are_refused_with_another_method(run, given: tuple[str, ...]):
    error = run("compress", "nets:tiny", "--data", "nets:batches", "-b", "macs=50%", *given, code=2).stderr
    assert f"{' '.join(given)} is for --method learned-ranks, not for --method low-rank" in error


def test_help_of_path_loads_no_torch():
    script = (
        "import sys\n"
        "sys.argv = ['spectrim', 'path', '--help']\n"
        "from spectrim.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code\n"
        "sys.exit('loaded torch' if 'torch' in sys.modules else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--c-steps" in done.stdout
    assert "--json" in done.stdout


@pytest.mark.slow
def test_without_a_folder_for_checkpoints_a_stopped_run_goes_on_from_its_results(run, monkeypatch: pytest.MonkeyPatch):
    arguments = (*LEARN, "-b", "macs=50%", "--no-report")
    run(*arguments, "--out", "whole")
    assert not Path("whole/unfinished").exists()

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("spectrim.cli.results.Outcome.compared", stop)  # trained, and nothing written
        assert "the same call goes on" in run(*arguments, "--out", "cut", code=130).stderr
    learned = Path("cut/unfinished/learning.safetensors").read_bytes()
    assert "was 4 and is 5" in run(*learn("rank_epochs=2,c_steps=5"), "-b", "macs=50%", "--out", "cut", code=2).stderr
    assert Path("cut/unfinished/learning.safetensors").read_bytes() == learned
    run(*arguments, "--out", "cut")
    assert same(weights("whole"), weights("cut"))
    assert not Path("cut/unfinished").exists()
