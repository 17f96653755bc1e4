from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from spectrim.cost.rounds import Speed, Timing
from spectrim.errors import ForwardError
from spectrim.linalg.patterns import pattern
from spectrim.nn.agreement import Agreement
from spectrim.nn.layers import canonical, spec_of
from spectrim.nn.sparse.layers import Masked, sparse_layer
from spectrim.nn.sparse.products import Kernel
from spectrim.nn.surgery import merge, parameter_count, size_in_bytes
from spectrim.report import Comparison, Measure, accuracy, compare, measure, show
from spectrim.report.measures import counted_macs, file_size
from spectrim.report.side_by_side import SideBySide


def _net(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 16, 3)
    )


@pytest.fixture(scope="module")
def compared() -> Comparison:
    batch = (torch.randn(2, 1, 4, 4), torch.tensor([0, 1]))
    return compare(_net(8), _net(2), batch, evaluate=lambda m: 90.0 if m[0].out_channels == 8 else 89.5, repeats=2)  # type: ignore[union-attr,index]


def test_counts_are_those_of_the_models(compared: Comparison):
    assert [row.metric for row in compared.rows] == [
        "accuracy", "parameters", "MACs", "file size", "peak memory", "latency p50", "latency p90",
    ]  # fmt: skip
    assert compared["parameters"].dense == 8 * 9 + 8 + 16 + 8 * 16 * 3 + 3
    # A sample, though the batch has two.
    assert compared["MACs"].compressed == 2 * 9 * 16 + 2 * 16 * 3
    assert compared["MACs"].ratio == 4
    assert compared["peak memory"].compressed < compared["peak memory"].dense
    assert compared["latency p90"].dense >= compared["latency p50"].dense > 0
    assert compared.batch == 2
    assert "torch" in compared.facts
    with pytest.raises(KeyError, match="'speed'"):
        compared["speed"]


def test_ratio_of_median_times_is_the_one_whose_interval_is_told():
    # A machine that is busy during half of the rounds moves both medians: 22.7 and 16.7 ms, though 1.15 run beside run.
    row = Measure("latency p50", "ms", 22.72, 16.68, speed=Speed(1.15, 1.13, 1.18))
    assert row.ratio == 1.15
    assert row.change + row.spread == "1.15x (1.13-1.18x)"
    assert Measure("latency p90", "ms", 23.99, 18.31, speed=row.speed).change == "1.31x"


def test_text_is_aligned_and_json_is_plain(compared: Comparison):
    lines = compared.to_text().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + len(compared.rows), "a line stands beneath the heads, as in every table"
    assert "-0.50 points" in lines[2]
    assert "4.00x" in lines[4]
    document = json.loads(json.dumps(compared.to_dict(), allow_nan=False))
    assert document["rows"][0] == {
        "metric": "accuracy",
        "unit": "%",
        "dense": 90.0,
        "compressed": 89.5,
        "ratio": 90 / 89.5,
    }


def test_a_single_model_has_the_same_rows():
    found = measure(_net(8), torch.randn(1, 1, 4, 4), repeats=1)
    assert [line.metric for line in found.lines][:2] == ["parameters", "MACs"]
    assert found.lines[1].value == 8 * 9 * 16 + 8 * 16 * 3
    assert measure(_net(8), torch.randn(1, 1, 4, 4), repeats=0).lines[-1].metric == "peak memory"


def test_a_model_that_does_not_take_the_example_is_named():
    with pytest.raises(ForwardError, match=r"'compressed' \(Linear\) raises RuntimeError on the example: .*give one"):
        compare(nn.Sequential(nn.Linear(8, 4)), nn.Linear(3, 3), torch.randn(2, 8), repeats=0)


def test_models_are_left_as_found():
    dense, small = _net(4).train(), _net(2).train()
    dense[1].eval()  # type: ignore[index]
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    compare(dense, small, torch.randn(2, 1, 4, 4), repeats=1)
    assert dense.training
    assert not dense[1].training  # type: ignore[index]
    assert small[1].training  # type: ignore[index]
    assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items())


class _Echo(nn.Module):
    """Returns its input as logits, in a mapping, as language models do."""

    def forward(self, inputs, labels=None):
        return {"logits": inputs}


@pytest.mark.parametrize("as_mapping", [True, False])
def test_accuracy_counts_positions_over_batches_of_any_size(as_mapping: bool):
    logits, labels = torch.eye(4)[[0, 1, 2, 3, 0]], torch.tensor([0, 1, 2, 0, 0])
    pairs = [(logits[:2], labels[:2]), (logits[2:], labels[2:])]
    batches = [{"inputs": x, "labels": y} for x, y in pairs] if as_mapping else pairs
    assert accuracy(_Echo(), batches) == pytest.approx(80.0)


@pytest.mark.parametrize("where", ["weights", "batch"])
def test_no_accuracy_is_that_of_a_model_that_answers_nan(where: str):
    model, images = _net(2), torch.randn(4, 1, 4, 4)
    broken = next(model.parameters()) if where == "weights" else images
    with torch.no_grad():
        broken.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="the model answers NaN"):
        accuracy(model, [(images, torch.arange(4).remainder(3))])


def test_accuracy_without_labels_or_batches_says_so():
    with pytest.raises(ValueError, match="holds no labels"):
        accuracy(_Echo(), [torch.eye(2)])
    with pytest.raises(ValueError, match="no batches"):
        accuracy(_Echo(), [])


def test_shared_weights_count_once():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    apart = file_size(model)
    model[1].weight = model[0].weight
    assert parameter_count(model) == 16 * 16 + 2 * 16
    assert apart - file_size(model) > 16 * 16 * 4 * 0.8
    assert counted_macs(model, torch.randn(3, 16)) == 2 * 16 * 16


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2.4e6, "MAC", "2.40 M"),
        (41e9, "MAC", "41.00 G"),
        (1536, "B", "1.50 KiB"),
        (0.1234, "ms", "0.123 ms"),
        (12.345, "ms", "12.35 ms"),
        (99.5, "%", "99.50 %"),
        (12, "", "12"),
        (0.5, "", "0.500"),
    ],
)
def test_numbers_for_people(value: float, unit: str, text: str):
    assert show(value, unit) == text


def test_a_ratio_by_zero_is_not_a_number():
    row = Measure("MACs", "MAC", 5.0, 0.0)
    assert row.change == "-"
    assert row.ratio != row.ratio
    assert Comparison((row,)).to_dict()["rows"][0]["ratio"] is None


def test_attention_counts_as_it_does_in_plans() -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    heads, length, size = 2, 4, 8
    assert counted_macs(Attention(), torch.randn(3, heads, length, size)) == heads * length * length * 2 * size


def _sparse(kernel: Kernel = Kernel.DENSE) -> nn.Module:
    """A convolution, a transposed one and a linear layer with three of four entries zero."""
    torch.manual_seed(0)
    layers = []
    for module in (nn.Conv2d(1, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 3, 2), nn.Linear(9, 12)):
        weight, bias = canonical(module)
        mask = pattern("unstructured").keep(weight.square(), 0.25)
        made = sparse_layer(spec_of(module, ("layer",)), weight * mask, mask, pattern("unstructured"), bias)
        assert isinstance(made, Masked)
        if kernel in made.kernels:
            made.kernel = kernel
        layers.append(made)
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("kernel", [Kernel.DENSE, Kernel.CSR])
def test_zeros_are_neither_counted_nor_stored(kernel: Kernel):
    model = _sparse(kernel)
    example = torch.randn(2, 1, 4, 4)
    before = [layer.kernel for layer in model]  # type: ignore[union-attr]
    kept = [round(0.25 * numbers) for numbers in (8 * 9, 8 * 4 * 9, 9 * 12)]
    # Output positions of the convolution, input positions of the transposed one, rows of the linear layer.
    assert counted_macs(model, example) == kept[0] * 16 + kept[1] * 16 + kept[2] * 4 * 9
    assert [layer.kernel for layer in model] == before  # type: ignore[union-attr]
    assert not any(layer._forward_hooks for layer in model)
    assert parameter_count(model) == sum(kept) + 8 + 4 + 12
    rows = {row.metric: row.value for row in measure(model, example, repeats=0).lines}
    assert rows["parameters"] == parameter_count(model)
    assert size_in_bytes(model) < rows["file size"] < size_in_bytes(model) + 1200
    assert rows["file size"] < file_size(merge(model))


def test_an_unchanged_network_reads_no_difference(monkeypatch: pytest.MonkeyPatch):
    """Whatever the machine was busy with: here the second of the two is said to take 2.5 times as long."""
    slow = lambda models, *_, **__: {  # noqa: E731
        name: Timing((2.5,) * 30 if name == "compressed" else (1.0,) * 30) for name in models
    }
    monkeypatch.setattr("spectrim.report.comparison.measure_latency", slow)
    batch = torch.randn(2, 1, 4, 4)
    same = compare(_net(8), _net(8), batch)
    assert same["latency p50"].change == same["latency p90"].change == "no difference"
    assert "no difference (0.40-1.00x)" in same.to_text()
    other = compare(_net(8), _net(2), batch)
    assert other["latency p50"].change == "0.40x"
    median, slowest = json.loads(json.dumps(other.to_dict()))["rows"][-2:]
    assert (median["spread"], median["differs"]) == ([0.4, 0.4], True)
    # The interval is the median's: a ratio of slow runs may lie outside it.
    assert "spread" not in slowest
    assert slowest["differs"]
    assert [row[3] for row in other.to_rows()[-2:]] == ["0.40x (0.40-0.40x)", "0.40x"]


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (torch.full((3,), 0.5), "float32 such as 0.5, not classes 0 to 3"),
        (torch.tensor([0, 4, 1]), "int64 such as 4,"),
        (torch.tensor([0, -1, 1]), "int64 such as -1,"),
        (torch.zeros(3, 4), "of shape"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: torch.Tensor, why: str):
    with pytest.raises(ValueError, match=why):
        accuracy(nn.Identity(), [(torch.eye(4)[:3], labels)])


def test_labels_may_be_whole_numbers_in_a_column_and_ignored_ones():
    outputs = torch.eye(4)[:3]
    assert accuracy(nn.Identity(), [(outputs, torch.tensor([[0.0], [1.0], [3.0]]))]) == pytest.approx(200 / 3)
    assert accuracy(nn.Identity(), [(outputs, torch.tensor([0, 1, -100]))]) == pytest.approx(200 / 3)


def test_several_networks_are_compared_with_one_dense_network():
    torch.manual_seed(0)
    dense, half, third = nn.Linear(8, 6), nn.Linear(8, 6, bias=False), nn.Linear(8, 6)
    found = compare(dense, {"half": half, "third": third}, torch.randn(4, 8), repeats=2)
    assert found["half"]["parameters"].compressed == 48
    assert found["third"]["parameters"].ratio == 1
    assert str(found).splitlines()[0].split() == ["dense", "half", "third"]
    assert [row["parameters"] for row in found.rows()] == [48, 54]
    assert {row.metric for row in found["half"].rows} >= {"latency p50", "MACs"}
    for names in ({}, {"dense": half}):
        with pytest.raises(ValueError, match="another name than 'dense'"):
            compare(dense, names, torch.randn(4, 8))


def test_it_is_told_of_which_samples_agreements_are():
    def told(*samples: int) -> tuple[str, ...]:
        agreements = {name: Agreement(number, 0.1) for name, number in zip("ab", samples, strict=True)}
        return SideBySide({}, agreements).sentences

    assert told(64, 64) == ("outputs are compared with the dense network's on 64 samples",)
    assert told(64, 1) == ("outputs are compared with the dense network's on 64 samples (a) and 1 sample (b)",)
