from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spectrim.selection.plan import Plan

DATA = ("--data", "nets:batches")


def test_help_loads_no_torch_and_nothing_else_that_is_heavy():
    script = (
        "import sys\n"
        "sys.argv = ['spectrim', 'compress', '--help']\n"
        "from spectrim.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code\n"
        "heavy = {'torch', 'numpy', 'scipy', 'matplotlib', 'sklearn', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--budget" in done.stdout


@pytest.mark.parametrize("command", ["profile", "compress", "sweep", "compare", "evaluate", "export", "demo"])
def test_every_command_has_help_and_json(run, command: str):
    text = run(command, "--help").stdout
    assert "--json" in text
    assert "--debug" in text


def test_profile_lists_layers_costs_and_what_is_skipped(run):
    found = run.json("profile", "nets:tiny", *DATA, "--skip", "conv")
    assert [layer["name"] for layer in found["layers"]] == ["wide", "head"]
    assert found["skipped"] == [{"name": "conv", "kind": "Conv2d 3x3", "reason": "skipped on request"}]
    wide = found["layers"][0]
    assert wide["costs"]["macs"] == 12 * 12 * 9 * 64
    assert wide["costs"]["parameters"] == 12 * 12 * 9 + 12
    assert found["unit"] == "output energy"
    assert found["samples"] == 64
    for ranks in wide["ranks"].values():
        assert 1 <= ranks["90%"] <= ranks["99%"]
    assert wide["macs_left"]["5%"] <= wide["macs_left"]["1%"] <= 1
    text = run("profile", "nets:tiny", *DATA, "--skip", "conv").stdout
    assert "wide" in text
    assert "skipped on request" in text


def test_profile_without_data_counts_parameters_only_and_with_a_shape_macs_too(run):
    bare = run.json("profile", "nets:tiny")
    assert "macs" not in bare["costs"]
    assert bare["unit"] == "weight energy"
    shaped = run.json("profile", "nets:tiny", "--input", "1x8x8")
    assert shaped["costs"]["macs"] == 64 * 9 * 12 * (1 + 12) + 120


@pytest.mark.slow
def test_profile_measures_latency(run):
    found = run.json("profile", "nets:tiny", *DATA, "--latency", "--only", "wide")
    (kept,) = Path("cache").glob("latency-*.json")
    assert found["layers"][0]["costs"]["latency"] in json.loads(kept.read_text())["timings"].values()


def test_compress_writes_what_it_says(run):
    found = run.json("compress", "nets:tiny", *DATA, "--budget", "macs=50%", "--test", "nets:batches", "--out", "small")
    assert {Path(p).name for p in found["files"].values()} == {
        "model.safetensors", "plan.json", "report.html", "result.json",
    }  # fmt: skip
    assert all(Path(p).is_file() for p in found["files"].values())
    assert found["costs"]["macs"] <= found["budget"]["macs"] == found["dense_costs"]["macs"] / 2
    plan = Plan.read(found["files"]["plan"])
    assert plan.costs["macs"] == found["costs"]["macs"]
    rows = {row["metric"]: row for row in found["comparison"]["rows"]}
    # The table predicts what is then counted on the finished model.
    assert rows["MACs"]["compressed"] == pytest.approx(plan.costs["macs"])
    assert rows["parameters"]["compressed"] == pytest.approx(plan.costs["parameters"])
    assert rows["accuracy"]["dense"] == found["scores"]["dense"]

    again = run.json("compress", "nets:tiny", *DATA, "--plan", "small/plan.json", "--no-report", "--out", "again")
    assert "report" not in again["files"]
    first, second = (load_file(f"{folder}/model.safetensors") for folder in ("small", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)

    measured = run.json("evaluate", "nets:tiny", "--checkpoint", "small/model.safetensors", *DATA, "--repeats", "0")
    values = {row["metric"]: row["value"] for row in measured["rows"]}
    assert values["accuracy"] == found["scores"]["compressed"]
    assert values["MACs"] == rows["MACs"]["compressed"]
    assert "latency p50" not in values
    both = run.json(
        "evaluate", "nets:tiny", "-c", "small/model.safetensors", "--compare", "--input", "1x8x8", "--repeats", "2"
    )
    assert {row["metric"]: row["ratio"] for row in both["rows"]}["MACs"] > 1.9


def test_compress_fine_tunes_and_prints_a_table(run):
    arguments = ("--budget", "parameters=60%", "--train", "nets:batches", "--test", "nets:batches", "--epochs", "1")
    text = run("compress", "nets:tiny", *DATA, *arguments, "--lr", "0.01", "--quiet").stdout
    assert "Fine-tuned for 1 epoch" in text
    assert "parameters" in text
    assert "report.html" in text


def test_compress_without_data_uses_the_weights(run):
    found = run.json("compress", "nets:tiny", "--input", "1x8x8", "-b", "macs=60%", "--no-report")
    assert {e.choice.method for e in Plan.read(found["files"]["plan"]) if not e.choice.is_dense} == {"WeightSVD"}


def test_the_suffix_says_what_is_written(run, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("onnxscript")

    def written(model, example, path, **more) -> float:
        Path(path).write_bytes(b"for ONNX Runtime")
        return 2e-6

    monkeypatch.setattr("spectrim.nn.export.export_onnx", written)
    found = run.json("export", "nets:tiny", "--input", "1x8x8", "--out", "files/m.onnx")
    assert (found["format"], found["bytes"], found["difference"]) == ("onnx", 16, 2e-6)


@pytest.mark.parametrize("suffix", [pytest.param("onnx", marks=pytest.mark.slow), "pt2"])
def test_export_is_checked(run, suffix: str):
    if suffix == "onnx":
        pytest.importorskip("onnxruntime")
    found = run.json("export", "nets:tiny", "--input", "1x8x8", "--out", f"files/m.{suffix}")
    assert found["format"] == suffix
    assert found["difference"] < 1e-4
    assert Path(found["file"]).stat().st_size == found["bytes"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("profile", "nowhere:model"), 2, "'nowhere:model'"),
        (("profile", "nets:no_layers"), 2, "no layer to compress"),
        (("profile", "nets:tiny", "--skip", "layer9"), 2, "'layer9'"),
        (("profile", "nets:tiny", "--latency"), 2, "--latency needs"),
        (("profile", "nets:tiny", "--method", "magic"), 2, "'magic'"),
        (("profile", "nets:tiny", "--method", "activation-svd"), 2, "needs calibration"),
        (("profile", "nets:tiny", "--input", "1x8xa"), 2, "'1x8xa'"),
        (("profile", "nets:tiny", "--device", "abacus"), 2, "abacus"),
        (("compress", "nets:tiny", *DATA), 2, "give one of --budget"),
        (("compress", "nets:tiny", *DATA, "-b", "macs=50%", "--plan", "broken.json"), 2, "give one of --budget"),
        (("compress", "nets:tiny", "-b", "macs=50%"), 2, "give --data"),
        (("compress", "nets:tiny", *DATA, "-b", "speed=2"), 2, "--budget limits 'speed'"),
        (("compress", "nets:tiny", *DATA, "-b", "macs=many"), 2, "'many'"),
        (("compress", "nets:tiny", *DATA, "--macs", "50%"), 2, "Did you mean '--budget'?"),
        (("compress", "https://a.b/net.pt", *DATA, "-b", "macs=50%"), 2, "is an address"),
        (("compress", "nets:tiny", *DATA, "-b", "macs=50%", "--selector", "lucky"), 2, "'lucky'"),
        (("compress", "nets:tiny", *DATA, "-b", "macs=50%", "--runtime", "onnx"), 2, "Did you mean 'onnxruntime'?"),
        (("compress", "nets:tiny", *DATA, "--plan", "gone.json"), 2, "'gone.json'"),
        (("compress", "nets:tiny", *DATA, "-b", "macs=0.01%"), 3, "the lowest reachable is"),
        (("compress", "nets:tiny", *DATA, "--plan", "broken.json"), 2, "is no plan"),
        (("evaluate", "nets:tiny"), 2, "give --data"),
        (("evaluate", "nets:tiny", "--data", "nets:unlabelled"), 2, "holds no labels"),
        (("evaluate", "nets:tiny", *DATA, "--compare"), 2, "needs --checkpoint"),
        (("evaluate", "nets:tiny", *DATA, "-c", "gone.safetensors"), 2, "'gone.safetensors'"),
        (("evaluate", "nets:tiny", *DATA, "-c", "broken.json"), 2, "broken.json"),
        (("export", "nets:tiny", "--input", "1x8x8", "--out", "m.tflite"), 2, "'m.tflite'"),
        (("export", "nets:tiny", "--out", "m.onnx"), 2, "example input"),
        (("demo", "--budget", "fast"), 2, "'fast'"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(run, arguments: tuple[str, ...], code: int, message: str):
    Path("broken.json").write_text("{")
    result = run(*arguments, code=code)
    assert result.stdout == ""
    # What it had to say before stands above it.
    *_, last = (line for line in result.stderr.splitlines() if line.startswith("spectrim: error: "))
    assert message in last
    assert "Traceback" not in result.stderr
    document = run.json(*arguments, code=code)
    assert document["error"]["exit_code"] == code
    assert message in document["error"]["message"]


def test_click_refuses_unknown_options_with_the_same_code(run):
    for arguments in (("compress",), ("profile", "nets:tiny", "--no-such-option")):
        assert run(*arguments, code=2).exit_code == 2


def test_debug_shows_where(run):
    with pytest.raises(ValueError, match="nowhere"):
        run("profile", "nowhere:model", "--debug")


def test_json_stays_alone_when_a_model_prints(run):
    result = run("profile", "nets:chatty", "--json")
    assert json.loads(result.stdout)["model"] == "nets:chatty"
    assert "a library that prints" in result.stderr


def test_demo_runs_end_to_end(run):
    before = torch.random.get_rng_state()
    found = run.json("demo", "--width", "16", "--dense-epochs", "1", "--epochs", "1", "--batch", "4", "--quiet")
    assert set(found["files"]) == {"model", "plan", "report", "result"}
    assert found["dense_costs"]["macs"] >= 4 * found["costs"]["macs"]
    assert list(found["scores"]) == ["dense", "compressed", "fine-tuned"]
    assert torch.equal(torch.random.get_rng_state(), before)
    said = [line.partition(":")[0].split()[0] for line in found["notes"]]
    assert {"Done", "Smaller", "Accuracy"} <= set(said)
    assert len({"Time", "Faster", "Slower"} & set(said)) == 1
    assert "DigitsNet(width=16), 'demo-out/model.safetensors'" in found["load"]
    model = "spectrim.cli.digits_net:DigitsNet?width=16"
    again = run.json("evaluate", model, "-c", found["files"]["model"], "--data", "digits", "--repeats", "0")
    assert again["rows"][0]["value"] == pytest.approx(found["scores"]["fine-tuned"], abs=0.5)


def test_a_model_whose_only_weight_has_two_readers_is_looked_at(run):
    assert [row["name"] for row in run.json("profile", "nets:tied")["layers"]] == ["table"]
