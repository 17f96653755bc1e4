"""Principal filter analysis on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spectrim import Plan, calibrate, couple, find
from spectrim.cli.data import load_data
from spectrim.cli.filter_widths import SHARES
from spectrim.cli.filters import filter_notes, filter_values, planned_methods
from spectrim.cli.methods import FILTERS as METHOD
from spectrim.cli.models import load_compressed, load_model
from spectrim.methods import ActivationSVD, ActivationTucker2, PrincipalFilters, TiedSVD
from spectrim.search.widths import KL, Energy, recommend, widths

DATA = ("--data", "nets:batches")
FILTERS = ("--method", METHOD)
HALF = ("--budget", "macs=50%")
BARE = ("nets:tiny", *DATA, "--no-report", "--quiet")
QUICK = (*BARE, *FILTERS)


@pytest.fixture
def dense(near):
    """The model that most tests name."""
    return load_model("nets:tiny")


@pytest.fixture
def sites(dense):
    model, batches = dense, list(load_data("nets:batches", purpose="calibration"))
    return calibrate(model, couple(model, find(model), batches[0]), batches)


def test_compress_removes_filters_and_meets_the_budget_in_what_is_measured(run):
    found = run.json("compress", "nets:tiny", *DATA, *FILTERS, *HALF, "--out", "small")
    plan = Plan.read("small/plan.json")
    rows = {row["metric"]: row for row in found["comparison"]["rows"]}
    assert rows["parameters"]["compressed"] == plan.costs["parameters"]
    assert rows["MACs"]["compressed"] == plan.costs["macs"] <= 0.5 * rows["MACs"]["dense"]
    small = load_compressed("nets:tiny", "small/model.safetensors")
    kept = {group["name"]: group["kept"] for group in found["filters"]}
    assert isinstance(small.wide, nn.Conv2d)
    assert (small.conv.out_channels, small.wide.in_channels) == (kept["conv:out"],) * 2
    assert (small.wide.out_channels, small.head.in_features) == (kept["wide:out"],) * 2
    assert found["filters"][0]["places"] == ["conv", "wide"]
    assert {group["rule"] for group in found["filters"]} == {"reconstruction"}
    gone = 24 - sum(kept.values())
    assert f"{gone} of 24 filters removed, in 2 of 2 groups of channels." in found["notes"]
    assert any(f"in {plan.facts['steps']} step" in note for note in found["notes"])
    assert "12 channels" in Path("small/report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_was_compressed_can_be_evaluated_exported_and_carried_out_again(run, dense):
    run("compress", *QUICK, *HALF, "--out", "small")
    costs = Plan.read("small/plan.json").costs
    checkpoint = ("--checkpoint", "small/model.safetensors")
    measured = run.json("evaluate", "nets:tiny", *checkpoint, *DATA, "--repeats", "0")
    values = {row["metric"]: row["value"] for row in measured["rows"]}
    assert (values["parameters"], values["MACs"]) == (costs["parameters"], costs["macs"])
    exported = run.json("export", "nets:tiny", *checkpoint, "--input", "1x8x8", "--out", "small.pt2")
    assert exported["difference"] < 1e-5

    again = ("compress", "nets:tiny", "--plan", "small/plan.json", "--no-report", "--quiet")
    run(*again, *DATA, "--out", "again")
    stored, same = (load_file(f"{folder}/model.safetensors") for folder in ("small", "again"))
    assert stored.keys() == same.keys()
    for key in stored:
        torch.testing.assert_close(stored[key], same[key])
    # Without data nothing can be made up for, but the same filters go.
    run(*again, "--input", "1x8x8", "--out", "bare")
    bare = load_file("bare/model.safetensors")
    assert {key: t.shape for key, t in bare.items()} == {key: t.shape for key, t in stored.items()}
    kept = Plan.read("small/plan.json")["conv:out"].choice["kept"]
    torch.testing.assert_close(bare["conv.weight"], dense.conv.weight.detach()[list(kept)])


@pytest.mark.table(every=2)
@pytest.mark.parametrize(("text", "recipe"), [("kl", KL()), ("energy=0.8", Energy(0.8))])
def test_a_recipe_takes_the_place_of_a_budget(run, sites, text: str, recipe: Energy | KL):
    filters = ("--method", f"{METHOD}:rule=l1-max,pooling=mean")
    found = run.json("compress", *BARE, *filters, "--recipe", text, "--multiple-of", "2")
    method = PrincipalFilters(rule="l1-max", pooling="mean", multiple_of=2)
    expected = recommend(sites, recipe, method=method)
    plan = Plan.read("compressed/plan.json")
    assert [entry.choice for entry in plan] == [entry.choice for entry in expected]
    assert plan.methods == {"PrincipalFilters": method.record()}
    assert plan.budget == {}
    assert found["costs"] == expected.costs
    assert {group["name"]: group["kept"] for group in found["filters"]} == {
        name: width for name, width in widths(sites, recipe, method=method).items() if width < 12
    }


@pytest.mark.slow
def test_low_rank_competes_where_it_is_asked_for(run):
    def kinds(*options: str) -> set[str]:
        run("compress", "filter_nets:redundant", *DATA, *FILTERS, *HALF, "--no-report", "--quiet", *options)
        return {entry.choice.kind for entry in Plan.read("compressed/plan.json")} - {"dense"}

    assert kinds() == {"kept_channels"}
    assert "low_rank" in kinds("--method", "low-rank")


@pytest.mark.slow
def test_fine_tuning_trains_the_narrow_network(run):
    run("compress", *QUICK, *HALF, "--out", "at-once")
    tuned = run.json("compress", *QUICK, *HALF, "--train", "nets:batches", "--test", "nets:batches", "--epochs", "1")
    assert tuned["scores"].keys() == {"dense", "compressed", "fine-tuned"}
    before, after = (load_compressed("nets:tiny", f"{f}/model.safetensors") for f in ("at-once", "compressed"))
    assert before.wide.weight.shape == after.wide.weight.shape
    assert not torch.equal(before.wide.weight, after.wide.weight)


def test_profile_lists_the_recommended_widths(run, dense, sites):
    found = run.json("profile", "nets:tiny", *DATA, *FILTERS)
    recipes = {"kl": KL(), **{f"energy={share}": Energy(share) for share in SHARES}}
    assert found["networks"].keys() == recipes.keys()
    for key, recipe in recipes.items():
        assert {g["name"]: g["widths"][key] for g in found["groups"]} == widths(sites, recipe, rounded=False)
        assert found["networks"][key] == {c: recommend(sites, recipe).costs[c] for c in ("parameters", "macs")}
    first = found["groups"][0]
    assert (first["channels"], first["dead"]) == (12, 0)
    assert (first["written_by"], first["passed_by"], first["read_by"]) == (["conv"], [], ["wide"])
    assert found["costs"]["parameters"] == sum(p.numel() for p in dense.parameters())
    assert [each["name"] for each in found["skipped"]] == ["head:out"]


def test_profile_prints_tables_and_draws_the_figure(run, sites):
    text = run("profile", "nets:tiny", *DATA, *FILTERS, "--figure", "figures/widths.svg").stdout
    row = next(line for line in text.splitlines() if line.startswith("wide "))
    asked = [widths(sites, recipe, rounded=False)["wide:out"] for recipe in (KL(), *map(Energy, SHARES))]
    assert row.split() == ["wide", "12", "0", *map(str, asked)]
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "no layer reads its channels" in text
    assert "passed by" not in text
    assert text.rstrip().endswith("figure figures/widths.svg")
    assert Path("figures/widths.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_dead_filters_and_depthwise_layers_are_listed(run):
    found = run.json("profile", "filter_nets:separable", *DATA, "--method", f"{METHOD}:pooling=mean")
    (first, *_) = found["groups"]
    assert (first["name"], first["dead"]) == ("0:out", 2)
    assert (first["written_by"], first["passed_by"], first["read_by"]) == (["0"], ["2"], ["4"])
    assert "passed by" in run("profile", "filter_nets:separable", *DATA, *FILTERS).stdout


@pytest.mark.slow
def test_too_few_samples_are_said(run):
    few = ("--data", "nets:batches?samples=8")
    (note,) = run.json("profile", "nets:tiny", *few, *FILTERS)["notes"]
    assert "2 of 2 groups" in note
    assert "up to 12 channels with 8 responses" in note
    small = ("compress", "nets:tiny", *few, "--no-report", "--method")
    assert note in run.json(*small, METHOD, "--recipe", "kl")["notes"]
    # Every position is a response of its own, and without a recipe nobody reads the spectra.
    assert note not in run.json(*small, f"{METHOD}:pooling=none", "--recipe", "kl")["notes"]
    assert note not in run.json(*small, METHOD, *HALF)["notes"]
    assert run.json("profile", "nets:tiny", *DATA, *FILTERS)["notes"] == []


def test_plans_without_removals_say_nothing_of_filters(run, dense, sites):
    run("compress", "nets:tiny", *DATA, *HALF, "--no-report", "--quiet")
    plan = Plan.read("compressed/plan.json")
    assert planned_methods(plan, True) == []
    assert filter_values(plan) == []
    assert filter_notes(plan, find(dense)) == []
    method = PrincipalFilters("abs-max", "none", 2)
    assert planned_methods(recommend(sites, Energy(0.8), method=method), True) == [method]


def test_the_table_of_a_plan_has_low_rank_if_the_plan_has(run):
    run("compress", "filter_nets:redundant", *DATA, *FILTERS, *HALF, "--method", "low-rank", "--no-report", "--quiet")
    plan = Plan.read("compressed/plan.json")
    assert planned_methods(plan, True) == [PrincipalFilters(), ActivationSVD(), ActivationTucker2(), TiedSVD()]


@pytest.mark.table
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", f"{METHOD}:pooling=median"), "pooling is 'median'; expected one of max, mean, none; the options"),
        (("--method", METHOD, "--share"), f"--share does not combine with --method {METHOD}"),
    ],
)
@pytest.mark.parametrize("command", [("profile",), ("compress", *HALF)], ids=["profile", "compress"])
def test_what_cannot_be_carried_out_is_quoted(run, command: tuple[str, ...], arguments: tuple[str, ...], message: str):
    name, *options = command
    result = run(name, "nets:tiny", *options, *DATA, *arguments, code=2)
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*FILTERS, "--recipe", "kl", *HALF), "--budget macs=50% does not combine with --recipe kl, which says"),
        ((*FILTERS, "--recipe", "kl", "--method", "low-rank"), f"--method {METHOD} --method low-rank does not combine"),
        ((*FILTERS, "--recipe", "kl", "--selector", "greedy"), "--selector greedy does not combine with --recipe kl"),
        ((*FILTERS, "--recipe", "kl", "--plan", "p.json"), "--plan p.json does not combine with --recipe kl"),
        ((*FILTERS, "--recipe", "energy=1.5"), "--recipe energy=1.5: the share of energy is 1.5; expected a"),
        ((*FILTERS, "--recipe", "energy=0"), "--recipe energy=0: the share of energy is 0.0"),
        ((*FILTERS, "--recipe", "energy=nan"), "--recipe energy=nan: the share of energy is nan"),
        ((*FILTERS, "--recipe", "energy=most"), "--recipe energy=most: 'most' is not a number"),
        ((*FILTERS, "--recipe", "energy"), "--recipe 'energy' is not known; choose kl, or energy=SHARE"),
        (("--method", f"{METHOD}:rule=l2", *HALF), "rule is 'l2'; expected one of reconstruction, l1-max"),
        (FILTERS, "--max-drop, --min-agreement, --recipe (as kl) or --plan FILE"),
        (("--recipe", "kl"), f"--recipe kl is for --method {METHOD}, not for --method low-rank"),
    ],
)  # fmt: skip
def test_options_of_compress_that_do_not_fit_are_quoted(run, arguments: tuple[str, ...], message: str):
    result = run("compress", "nets:tiny", *DATA, *arguments, code=2)
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "nets:tiny", *HALF), f"--method {METHOD} needs calibration batches: give --data"),
        (("profile", "nets:tiny", "--input", "1x8x8"), f"--method {METHOD} needs calibration batches: give --data"),
        (("profile", "nets:tiny", *DATA, "--latency"), "--latency does not combine with"),
        (("profile", "nets:tiny", *DATA, "--figure", "w.gif"), "--figure 'w.gif': expected a name ending in .svg"),
        (("compress", "nets:tiny", *DATA, *HALF, "--only", "head"), "there are no filters to remove ("),
    ],
)
def test_what_is_missing_is_said(run, arguments: tuple[str, ...], message: str):
    assert message in run(*arguments, *FILTERS, code=2).stderr


def test_a_plan_says_itself_what_is_removed(run, sites):
    recommend(sites, KL()).write("plan.json")
    filters = ("--method", f"{METHOD}:rule=l1-max")
    result = run("compress", "nets:tiny", *DATA, *filters, "--plan", "plan.json", code=2)
    assert f"--method {METHOD} has options, but --plan says what is removed" in result.stderr


def test_the_least_widths_can_cost_too_much(run):
    result = run("compress", *QUICK, "--budget", "parameters=1%", code=3)
    assert "cannot be met" in result.stderr
