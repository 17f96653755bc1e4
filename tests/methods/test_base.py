"""Records of methods: whose they are, and what is refused."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.errors import PlanError
from spectrim.methods import ActivationSVD, WeightSVD, from_record
from spectrim.network.choices import SharedChoice
from spectrim.selection.plan import Plan

USERS = '''
from dataclasses import dataclass
import spectrim as st

@dataclass(frozen=True)
class {name}(st.WeightSVD):
    """Leaves the bias alone and keeps ranks even."""

    extra: int = 1

    def factorize(self, site, choice):
        import dataclasses
        factors = super().factorize(site, choice)
        return dataclasses.replace(factors, left=0 * factors.left)
'''


@pytest.fixture
def package() -> Iterator[object]:
    """Makes modules with a method of a name, and forgets them."""
    made: list[str] = []

    def make(module: str, name: str) -> ModuleType:
        sys.modules[module] = ModuleType(module)
        made.append(module)
        exec(USERS.format(name=name), sys.modules[module].__dict__)
        return sys.modules[module]

    yield make
    for module in made:
        sys.modules.pop(module, None)
    gc.collect()  # classes know their subclasses as long as these are there


def test_a_record_makes_the_method_again() -> None:
    method = ActivationSVD(unfoldings=("channel", "input"), multiple_of=4, sweeps=7)
    assert method.record() == {
        "type": "ActivationSVD",
        "module": "spectrim.methods.activation_svd",
        "options": {"unfoldings": ["channel", "input"], "multiple_of": 4, "to_full_rank": False, "sweeps": 7},
    }
    assert from_record(method.record()) == method
    assert from_record({"type": "WeightSVD"}) == WeightSVD()


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"type": "Magic", "options": {}}, "needs method 'Magic'; known are .*ActivationSVD.*WeightSVD"),
        ({"options": {}}, "type, module and options: .*`type`"),
        ({"type": 3}, "type, module and options: .*`str`"),
        ({"type": "WeightSVD", "module": 3}, "type, module and options: .*`str"),
        ({"type": "WeightSVD", "options": []}, "type, module and options: .*`object`"),
        ({"type": "WeightSVD", "options": {"sweeps": 1}}, "method WeightSVD has no option 'sweeps'"),
        ({"type": "WeightSVD", "options": {"multiple_of": "many"}}, "options of method WeightSVD"),
        ({"type": "WeightSVD", "options": {"multiple_of": 0}}, "multiple_of must be at least 1"),
        ({"type": "LowRankMethod", "options": {}}, "needs method 'LowRankMethod'"),
        (
            {"type": "Mine", "module": "this_is.nowhere"},
            "'Mine' of module 'this_is.nowhere'; known are .*Import its module",
        ),
        (
            {"type": "WeightSVD", "module": "os"},
            "'WeightSVD' of module 'os'; known are .*WeightSVD",
        ),
    ],
)
def test_a_wrong_record_is_refused(record: dict[str, object], complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        from_record(record)


def test_nothing_is_imported_for_a_record(tmp_path, monkeypatch) -> None:
    (tmp_path / "never_imported.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PlanError, match="'Mine' of module 'never_imported'; .*Import its module"):
        from_record({"type": "Mine", "module": "never_imported"})
    assert "never_imported" not in sys.modules


def test_a_record_means_the_class_of_its_module(package) -> None:
    mine = package("users_one", "WeightSVD").WeightSVD
    theirs = package("users_two", "WeightSVD").WeightSVD
    for cls in (mine, theirs, WeightSVD):
        assert type(from_record(json.loads(json.dumps(cls().record())))) is cls
    # Modules of Spectrim move; plans of version 0.1 do not name any.
    assert type(from_record({"type": "WeightSVD", "module": "spectrim.weight_svd"})) is WeightSVD
    assert type(from_record({"type": "WeightSVD"})) is WeightSVD


def test_a_record_without_a_module_means_the_one_class_of_that_name(package) -> None:
    mine = package("users_one", "UsersOwn").UsersOwn
    assert type(from_record({"type": "UsersOwn", "options": {"extra": 2}})) is mine
    package("users_two", "UsersOwn")
    with pytest.raises(PlanError, match="does not say whose, of modules users_one, users_two. Pass methods="):
        from_record({"type": "UsersOwn"})


def test_a_class_that_is_made_again_takes_the_place_of_the_first(package) -> None:
    package("users_one", "UsersOwn")
    again = package("users_one", "UsersOwn").UsersOwn
    assert type(from_record({"type": "UsersOwn", "module": "users_one"})) is again
    assert type(from_record({"type": "UsersOwn"})) is again


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False))


def planned(method: st.Method) -> Plan:
    model = net()
    return st.select(st.tabulate(st.find(model), [method]), st.Budget(parameters=0.5))


def test_a_plan_from_a_file_is_carried_out_by_the_class_that_made_it(package) -> None:
    model, sites = net(), st.find(net())
    text = planned(WeightSVD()).to_json()
    wanted = st.apply(model, sites, Plan.from_json(text)).state_dict()
    mine = package("users_one", "WeightSVD").WeightSVD
    other = planned(mine()).to_json()
    old = json.loads(text)
    for record in old["methods"].values():
        del record["module"]
    for plan in (text, json.dumps(old)):
        again = st.apply(model, sites, Plan.from_json(plan)).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())
    small = st.apply(model, sites, Plan.from_json(other))
    changed = [small[int(entry.site)] for entry in Plan.from_json(other) if not entry.choice.is_dense]
    assert changed
    assert not any(pair[0].weight.any() for pair in changed)


def test_two_methods_of_one_name_are_refused(package) -> None:
    mine = package("users_one", "WeightSVD").WeightSVD
    with pytest.raises(ValueError, match="two methods are called 'WeightSVD'"):
        st.tabulate(st.find(net()), [WeightSVD(), mine()])
    with pytest.raises(ValueError, match="two methods are called 'WeightSVD'"):
        st.apply(net(), st.find(net()), planned(WeightSVD()), methods=[WeightSVD(), mine()])


def test_a_method_carries_out_its_own_type_of_choice() -> None:
    plan = planned(WeightSVD())
    entry = next(entry for entry in plan if not entry.choice.is_dense)
    other = dataclasses.replace(entry, choice=SharedChoice("channel", 2, 0, method="WeightSVD"))
    plan = dataclasses.replace(plan, entries=tuple(other if e is entry else e for e in plan))
    with pytest.raises(PlanError, match=f"'{entry.site}': method WeightSVD carries out 'low_rank' choices, not 'sh"):
        st.apply(net(), st.find(net()), plan)
