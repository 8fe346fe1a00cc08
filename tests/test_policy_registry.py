"""Naming a policy: keys, options, a file of one's own, and what is said when one of them is wrong."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from muxtune.policies import base
from muxtune.policies.base import NoConfig, Policy, make_policy, policies
from muxtune.spec import registry
from muxtune.spec.check import check
from muxtune.spec.errors import DuplicateKeyError, InputError

MINE = """
from muxtune.policies.base import Policy
from muxtune.policies.build import make_instance, make_plan
from muxtune.spec.noun import noun

@noun
class Options:
    width: int = 2
    fast: bool = False
    share: float = 0.5
    limit: int | None = None
    name: str = "x"

class MyPolicy(Policy):
    Config = Options

    def plan(self, state):
        ids = [t.task_id for t in state.workload.tasks]
        groups = [ids[i : i + self.config.width] for i in range(0, len(ids), self.config.width)]
        instance = make_instance(state, "mine", groups, [[h] for h in range(len(groups))])
        return make_plan(self, "mine", state, [instance])
"""


@pytest.fixture(params=["", "from __future__ import annotations\n"], ids=["types", "texts"])
def mine(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A policy file whose annotations are types, or texts."""
    (tmp_path / "mine.py").write_text(request.param + MINE)
    return f"{tmp_path / 'mine.py'}:MyPolicy"


def test_every_policy_file_is_found() -> None:
    assert {"hf-peft", "sl-peft", "temporal", "muxtune", "greedy", "random"} <= set(policies())
    assert all(issubclass(found, Policy) for found in policies().values())


def test_own_file_with_options(mine: str, tiny_state: Any, fake_cost: Callable[..., Any]) -> None:
    policy = make_policy(f"{mine}:width=3,fast=on,share=0.25,limit=none", fake_cost())
    assert (policy.config.width, policy.config.fast, policy.config.share, policy.config.limit) == (3, True, 0.25, None)
    plan = policy.plan(tiny_state())
    assert check(plan) == ()
    assert [len(h.tasks) for h in plan.instances[0].htasks] == [3, 1]
    assert plan.made_by.config == "width=3,fast=true,share=0.25,limit=none,name=x"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing", r"unknown policy 'nothing': known are .*greedy.*hf-peft.*muxtune"),
        (
            "muxtune:chrage=exact",
            r"unknown option of policy muxtune 'chrage': known are adapter_fusion, alignment, charge, chunk, fusion",
        ),
        ("temporal:x=1", r"unknown option of policy temporal 'x': known are \(none\)"),
        ("muxtune:charge=cheap", r"policy muxtune: charge='cheap': known are \['paper', 'exact'\]"),
        ("muxtune:alignment=packed", r"alignment='packed': known are \['pad', 'varlen', 'chunk'\]"),
        ("muxtune:chunk=64", r"chunk=64 with alignment='pad': give a size above 0, and alignment=chunk with it"),
        ("greedy:alignment=chunk,chunk=-1", r"chunk=-1 with alignment='chunk': give a size above 0"),
        ("greedy:alignment=x", r"policy greedy: alignment='x': known are \['pad', 'varlen', 'chunk'\]"),
        ("muxtune:fusion=maybe", r"policy muxtune: fusion=maybe: expected true or false"),
        ("muxtune:fusion=on,fusion=off", r"'fusion=off' is not one key=value"),
        ("muxtune:charge=exact,fusion", r"'fusion' is not one key=value"),
        ("./absent.py:MyPolicy", r"\./absent\.py: file not found"),
    ],
)
def test_wrong_references(reference: str, message: str, fake_cost: Any) -> None:
    with pytest.raises(InputError, match=message):
        make_policy(reference, fake_cost())


def test_wrong_values_in_an_own_file(mine: str, fake_cost: Any) -> None:
    with pytest.raises(InputError, match="width=two: expected int"):
        make_policy(f"{mine}:width=two", fake_cost())
    with pytest.raises(InputError, match="share=half: expected float"):
        make_policy(f"{mine}:share=half", fake_cost())
    with pytest.raises(InputError, match=r"no Policy named 'Other'; it defines \['MyPolicy'\]"):
        make_policy(mine.replace("MyPolicy", "Other"), fake_cost())


def test_own_file_that_does_not_load(tmp_path: Path, fake_cost: Any) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(InputError, match=r"broken\.py: cannot be loaded: ModuleNotFoundError"):
        make_policy(f"{tmp_path / 'broken.py'}:MyPolicy", fake_cost())


def test_two_files_with_one_key(tmp_path: Path) -> None:
    for name in ("my_policy.py", "my-policy.py"):
        (tmp_path / name).write_text("")
    with pytest.raises(DuplicateKeyError, match="two files give the key 'my-policy'"):
        registry.plugin_modules(tmp_path, "anywhere")


def test_entry_points_add_and_do_not_replace(monkeypatch: pytest.MonkeyPatch, fake_cost: Any) -> None:
    target = "muxtune.policies.temporal:Temporal"
    entries = {"mine": EntryPoint("mine", target, "muxtune.policies")}
    monkeypatch.setattr(registry, "entry_points", lambda group: tuple(entries.values()))
    assert isinstance(make_policy("mine", fake_cost()), base.policies()["temporal"])
    entries["greedy"] = EntryPoint("greedy", target, "muxtune.policies")
    with pytest.raises(DuplicateKeyError, match="entry point 'greedy'"):
        policies()


def test_a_plugin_file_defines_one_class() -> None:
    with pytest.raises(InputError, match=r"exactly one Policy, found \['Policy'"):
        registry.load_class(_module_with_two(), Policy)


def _module_with_two() -> Any:
    class Module:
        __name__ = "two"

    module = Module()
    for name in ("One", "Two"):
        setattr(module, name, type("Policy", (Policy,), {"__module__": "two"}))
    return module


def test_base_policy_plans_nothing(tiny_state: Any, fake_cost: Any) -> None:
    with pytest.raises(NotImplementedError):
        Policy(NoConfig(), fake_cost()).plan(tiny_state())
