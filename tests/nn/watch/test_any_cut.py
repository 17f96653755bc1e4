"""Batches that take different ways, and what is said of masks and limits that cannot be meant."""

import pytest
import torch
from torch import Tensor, nn

import spectrim as st


class Experts(nn.Module):
    """Each sample goes to one of several experts of two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.gate = nn.Linear(20, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20)) for _ in range(4))
        self.out = nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        way = self.gate(x).argmax(1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = (way == number).nonzero().squeeze(1)
            if len(chosen):
                y = y.index_copy(0, chosen, expert(x[chosen]))
        return self.out(torch.relu(y))


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(200, 20, generator=torch.Generator().manual_seed(0)) * 0.9 ** torch.arange(20.0)


@pytest.mark.parametrize("size", [1, 4])
def test_layers_are_in_the_order_of_execution_whichever_batch_reaches_them_first(inputs: Tensor, size: int) -> None:
    model = Experts().eval()
    names = [site.name for site in st.calibrate(model, st.find(model), list(inputs[:80].split(size)))]
    assert names.index("gate") == 0
    assert names.index("out") == len(names) - 1
    assert all(names.index(f"experts.{n}.0") < names.index(f"experts.{n}.2") for n in range(4))


def test_experts_lose_the_same_however_samples_are_cut(inputs: Tensor) -> None:
    model = Experts().eval()
    lost = []
    with torch.no_grad():
        for size in (200, 8):
            small = st.compress(
                model, list(inputs.split(size)), "parameters=60%", methods=st.ActivationSVD(), sensitivity=False,
                skip=["gate"],
            ).model  # fmt: skip
            lost.append(float((small(inputs) - model(inputs)).square().sum()))
    assert lost[1] < 1.15 * lost[0]


def test_a_mask_that_is_added_to_scores_and_may_mean_two_things_is_refused(inputs: Tensor) -> None:
    model = nn.Sequential(nn.Linear(20, 8)).eval()
    padded = torch.zeros(40, 5)
    padded[:, 3:] = -1e9
    for mask in (padded, padded.unsqueeze(1) + torch.ones(1, 5, 1)):
        with pytest.raises(st.CalibrationError, match="below 0, as one that is added"):
            st.calibrate(model, st.find(model), [inputs.reshape(40, 5, 20)], mask=lambda batch, mask=mask: mask)


@pytest.mark.parametrize("option", ["rows", "positions"])
def test_true_is_no_number_of_rows(inputs: Tensor, option: str) -> None:
    model = nn.Sequential(nn.Linear(20, 8)).eval()
    with pytest.raises(ValueError, match=f"{option}=True: expected a positive int"):
        st.calibrate(model, st.find(model), [inputs], **{option: True})


@pytest.mark.parametrize("memory", [0, -5, "1GB", None, True])
def test_a_limit_of_memory_is_a_number_of_bytes(inputs: Tensor, memory: object) -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)).eval()
    sites = st.calibrate(model, st.find(model), [inputs])
    plan = st.select(st.tabulate(sites, st.ActivationSVD()), "macs=60%")
    with pytest.raises(ValueError, match="expected a positive int of bytes"):
        st.apply(model, sites, plan, [inputs], memory=memory)  # type: ignore[arg-type]
