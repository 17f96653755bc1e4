"""``--method``: names, options from the fields of the method, classes of one's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim import ActivationSVD, ActivationTucker2, JointSVD, LowRankPlusSparse, PrincipalFilters, TiedSVD, WeightSVD
from spectrim.cli.methods import AUTO, CLASSES, JOINT, LOW_RANK, Asked, Methods
from spectrim.cli.references import UsageError
from spectrim.selection.plan import Plan
from spectrim.tables import default_methods

DATA = ("--data", "nets:batches")
HALF = ("--budget", "macs=50%", "--no-report", "--quiet")


def chosen(*texts: str, **more):
    return Methods.read(texts).chosen(True, **more)


def test_a_name_ends_at_its_colon_and_values_may_hold_colons(near):
    asked = Asked.read("low-rank-plus-sparse:patterns=2:4+rows, share=0.3")
    assert (asked.name, asked.options) == ("low-rank-plus-sparse", {"patterns": "2:4+rows", "share": "0.3"})
    asked = Asked.read("package.module:Class:place=a:b")
    assert (asked.name, asked.options) == ("package.module:Class", {"place": "a:b"})
    assert Asked.read("package.module:Class").options == {}


def test_options_are_read_as_the_types_of_the_fields_say(near):
    import own

    text = "own:Mine:unfoldings=channel,flavours=sweet+sour,strength=2,careful=true,turns=5,multiple_of=none"
    assert chosen(text) == [
        own.Mine(("channel",), None, flavours=("sweet", "sour"), strength=2.0, careful=True, turns=5)
    ]
    assert chosen("own:Mine:strength=none") == chosen("own:Mine") == [own.Mine()]
    assert chosen("own:Plain:multiple_of=2") == [own.Plain(multiple_of=2)]
    sparse = LowRankPlusSparse(densities=(0.1, 0.3), share=0.5, exact=True)
    assert chosen("low-rank-plus-sparse:densities=0.1+0.3,share=0.5,exact=true") == [sparse]


def test_every_method_of_the_library_has_a_name():
    assert {type(chosen(name)[-1]).__name__ for name in CLASSES} == set(CLASSES.values())


def test_names_for_several_methods_and_what_is_offered_beside_them():
    low_rank = [ActivationSVD(), ActivationTucker2()]
    usual = [*low_rank, TiedSVD()]
    assert chosen() == chosen(LOW_RANK) == chosen(JOINT) == usual
    assert chosen("activation-tucker2", LOW_RANK) == [ActivationTucker2(), ActivationSVD(), TiedSVD()]
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(8, 3, 6, 6)
    # The command line and the call offer the same by default; this network has no layers of one weight.
    assert default_methods(st.calibrate(model, st.find(model), [x])) == low_rank
    assert Methods.read([LOW_RANK]).chosen(False) == [WeightSVD(), TiedSVD()]
    assert chosen(LOW_RANK, share=True)[3:] == [JointSVD("left"), JointSVD("right")]
    assert chosen(JOINT, share=True)[3:] == [JointSVD("left"), JointSVD("right"), JointSVD("both")]
    assert chosen("joint-svd:share=both", share=True) == [JointSVD("both")]
    assert chosen("principal-filters:rule=abs-max", LOW_RANK) == [PrincipalFilters("abs-max"), *usual]


def test_sets_that_compete_are_for_one_network_and_bring_their_own_methods():
    assert Methods.read([AUTO], competing=True).names == (AUTO,)
    with pytest.raises(UsageError, match="--method auto is for compress"):
        Methods.read([AUTO])
    with pytest.raises(UsageError, match="bring their own"):
        Methods.read([AUTO, LOW_RANK], competing=True)
    assert [Methods.read(texts).said for texts in (None, [], [LOW_RANK])] == [False, False, True]


def test_multiples_are_for_all_methods_that_do_not_say_their_own(near):
    import own

    several = chosen(JOINT, "own:Mine", "principal-filters:multiple_of=3", multiple_of=5, share=True)
    assert [m.multiple_of for m in several] == [5, 5, 5, 5, 3, 5, 5, 5]
    assert isinstance(several[3], own.Mine)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "--method 'magic' is not known; choose from low-rank, auto, joint, weight-svd, "),
        ("magic:", "--method 'magic:' is not known"),
        ("weight-svd:", "cannot read option ''"),
        ("weight-svd:multiple_of", "cannot read option 'multiple_of': write NAME=VALUE"),
        ("weight-svd:multiple_of=2,multiple_of=3", "option 'multiple_of' is there twice"),
        ("low-rank:multiple_of=2", "low-rank has no options; name a method, as weight-svd:multiple_of=2"),
        (
            "weight-svd:rank=3",
            "there is no option 'rank'; the options of weight-svd are unfoldings: ",
        ),
        ("low-rank-plus-sparse:pattern=2:4", "several joined by + = 0.0+0.01+0.02+0.03+"),
        (
            "low-rank-plus-sparse:share=most",
            "share is 'most'; expected a number or none; the options of",
        ),
        ("low-rank-plus-sparse:exact=maybe", "exact is 'maybe'; expected true or false"),
        ("low-rank-plus-sparse:ranks=2.5", "ranks is '2.5'; expected a whole number"),
        (
            "low-rank-plus-sparse:share=2",
            "share is 2.0; expected a number from 0 (sparse)",
        ),
        ("own:Mine:turns=12", "turns is 12; expected at most 9; the options of own:Mine are"),
        (
            "own:Mine:colour=red",
            "= plain; strength: a number or none = none; careful: true or false = false; turns: a whole number = 3",
        ),
        ("own:joules", "--method own:joules: joules is no subclass of spectrim.Method"),
        ("own:NUMBER", "'NUMBER' is a int"),
        ("own:Gone", "'own' has no attribute 'Gone'"),
        ("nowhere:Mine", "cannot import 'nowhere'"),
    ],
)
def test_what_cannot_be_meant_is_said_in_one_sentence(near, text: str, message: str):
    with pytest.raises(UsageError) as caught:
        chosen(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_methods_of_one_name_are_refused():
    with pytest.raises(UsageError, match="two methods are called 'WeightSVD'"):
        chosen("weight-svd", "weight-svd:multiple_of=3")


def test_a_class_of_ones_own_goes_through_profile_and_compress(run):
    found = run.json("profile", "nets:tiny", *DATA, "--method", "own:Mine:multiple_of=1", "--only", "wide")
    assert len(found["layers"]) == 1
    assert found["unit"] == "output energy"
    run("compress", "nets:tiny", *DATA, *HALF, "--method", "own:Mine:turns=4,multiple_of=2")
    plan = Plan.read("compressed/plan.json")
    assert {e.choice.method for e in plan if not e.choice.is_dense} == {"Mine"}
    assert plan.methods["Mine"]["options"]["turns"] == 4
    run("compress", "nets:tiny", *DATA, "--plan", "compressed/plan.json", "--out", "again", "--no-report", "--quiet")
    assert Plan.read("again/plan.json") == plan


def test_several_methods_compete(run):
    several = ("--method", "own:Mine", "--method", "low-rank-plus-sparse:patterns=rows,share=0,ranks=0")
    run("compress", "nets:tiny", "--input", "1x8x8", *HALF, *several)
    assert Plan.read("compressed/plan.json").methods.keys() <= {"Mine", "LowRankPlusSparse"}
    for arguments, message in (
        (("--method", "own:Mine:turns=12"), "turns is 12"),
        ((*several, "--method", "magic"), "'magic'"),
        (("--method", "learned-ranks"), "give --train"),
    ):
        assert message in run("compress", "nets:tiny", *DATA, *HALF, *arguments, code=2).stderr
    assert "is for compress" in run("profile", "nets:tiny", "--method", "learned-ranks", code=2).stderr


@pytest.mark.table(every=3)
@pytest.mark.parametrize(
    "arguments",
    [
        ("--method", "magic"),
        ("--method", "weight-svd:3", "-b", "macs=50%"),
        ("-b", "macs=50%", "--recipe", "kl"),
        ("-b", "macs=50%", "--selector", "lucky"),
        ("-b", "macs=50%"),
        (),
    ],
)
def test_what_is_wrong_on_the_face_of_it_is_said_without_loading_torch(arguments: tuple[str, ...]):
    script = (
        "import sys\n"
        f"sys.argv = ['spectrim', 'compress', 'nets:tiny', *{arguments!r}]\n"
        "from spectrim.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert done.code == 2, done.code\n"
        "sys.exit('loaded torch' if 'torch' in sys.modules else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
