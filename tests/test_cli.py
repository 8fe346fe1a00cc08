"""The command line: help is light, wrong input is one line and exit 2, "no" is exit 1, and the planning loop closes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from muxtune.experiments.commands.compare import split_policies
from muxtune.experiments.commands.profile import parse_degrees
from muxtune.experiments.console import json_text, render, table
from muxtune.experiments.main import main
from muxtune.spec.errors import InputError
from muxtune.spec.files import read_noun
from muxtune.spec.noun import canonical_bytes
from muxtune.spec.plan import Plan

COMMANDS = (
    *("demo", "profile", "plan", "check", "check-policy", "simulate", "compare", "execute", "validate"),
    *("report", "list", "replay", "sweep"),
)
HEAVY = frozenset({"torch", "numpy", "pandas", "pydantic", "yaml", "scipy", "matplotlib", "simpy", "pulp"})

WORKLOAD = """
model: gpt2
tasks:
  - {task_id: a, dataset: sst2, global_batch_samples: 4, peft: {kind: lora, rank: 8}}
  - {task_id: b, dataset: openbookqa, global_batch_samples: 4, peft: {kind: lora, rank: 16}}
  - {task_id: c, dataset: rte, global_batch_samples: 2, peft: {kind: lora, rank: 8}}
"""
POLICY = '''
from muxtune.policies.base import Policy
from muxtune.policies.build import make_instance, make_plan


class MyPolicy(Policy):
    """Two hTasks, one bucket each."""

    def plan(self, state):
        ids = [t.task_id for t in state.workload.tasks]
        instance = make_instance(state, "mine", [ids[:1], ids[1:]], [[0], [1]])
        return make_plan(self, "mine", state, [instance])


class Broken(Policy):
    def plan(self, state):
        raise KeyError("oops")
'''
ROW_KEYS = {
    *("policy", "feasible", "reason", "iteration_ns", "raw_tokens_per_s", "billed_tokens_per_s"),
    *("processed_tokens_per_s", "peak_bytes", "bubble_fraction", "exposed_comm_fraction", "energy_j"),
    *("extrapolated_fraction", "relative_error", "plan_seconds", "solver", "utilisation", "mfu", "stalls"),
    *("joules_per_billed_token", "energy_idle_j", "energy_dynamic_j"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a workload and a policy of one's own."""
    monkeypatch.chdir(tmp_path)
    Path("work.yaml").write_text(WORKLOAD)
    Path("mine.py").write_text(POLICY)
    return tmp_path


def run_json(capsys, *arguments, code=0):
    """Run a command with --json; exactly one object must come out."""
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def make_plan_file(name="plan.json", policy="muxtune", cluster="2xA40"):
    arguments = ["plan", "--workload", "work.yaml", "--cluster", cluster, "--policy", policy, "--out", name]
    assert main(arguments) == 0
    return name


def isolated(*arguments, code="import sys; from muxtune.experiments.main import main; main(sys.argv[1:])"):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"muxtune {command}" in out.split("Example:")[1]
    assert "--json" in out


def test_bare_call_shows_every_command(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {command} " in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    # typer itself reads the options of a command through pydantic.
    [(["--help"], HEAVY), (["compare", "--help"], HEAVY - {"pydantic"})],
)
def test_help_imports_nothing_heavy(arguments, heavy):
    code = "import sys; from muxtune.experiments.main import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    done = isolated(*arguments, code=code)
    assert "Usage" in done.stdout
    assert not {m.split(".")[0] for m in done.stderr.split()} & heavy


def one_line(capsys, *parts):
    captured = capsys.readouterr()
    assert captured.err.startswith("muxtune: error: ")
    assert captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err


PLAN = ("plan", "--workload", "work.yaml", "--cluster", "2xA40", "--policy", "muxtune")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nonsense",), ["nonsense", "--help"]),
        (("plan", "--policy", "muxtune"), ["--workload"]),
        ((*PLAN[:-1], "best"), ["unknown policy 'best'", "hf-peft", "muxtune"]),
        ((*PLAN[:-1], "muxtune:charge=free"), ["charge='free'", "paper"]),
        ((*PLAN[:-1], "muxtune:cost=1"), ["unknown option", "'cost'", "charge"]),
        ((*PLAN[:-1], "./mine.py:Other"), ["mine.py", "Other", "MyPolicy"]),
        ((*PLAN[:-1], "./none.py:Other"), ["none.py", "file not found"]),
        (("plan", "--workload", "gone.yaml", *PLAN[3:]), ["gone.yaml", "file not found"]),
        ((*PLAN, "--cluster", "2xZ9"), ["unknown device 'Z9'", "A40"]),
        ((*PLAN, "--cluster", "?"), ["cluster '?'", "4xA40-nvlink"]),
        ((*PLAN, "--cluster", "gone.yaml"), ["gone.yaml", "file not found"]),
        ((*PLAN, "--tp", "0"), ["--tp", "'0'", "equal to 1"]),
        ((*PLAN, "--tp", "4"), ["tp=4", "2xA40 has 2", "lower"]),
        ((*PLAN, "--cluster", "16xA40", "--pp", "13"), ["pp=13", "12 layers"]),
        ((*PLAN, "--seed", "-1"), ["--seed"]),
        ((*PLAN, "--microbatches", "x"), ["--microbatches", "'x'"]),
        ((*PLAN, "--cost", "gone"), ["'gone'", "roofline"]),
        ((*PLAN, "--cost", "table"), ["table", "profile"]),
        ((*PLAN, "--cost", "."), ["costs.json", "muxtune profile"]),
        ((*PLAN, "--cost", "work.yaml"), ["work.yaml", "missing"]),
        ((*PLAN, "--out", "."), ["--out .", "is a directory"]),
        ((*PLAN, "--out", "work.yaml/plan.json"), ["work.yaml", "not a directory"]),
        (("compare", *PLAN[1:5], "--out", "work.yaml"), ["--out work.yaml", "not a directory"]),
        (("compare", *PLAN[1:5], "--policies", "charge=exact"), ["charge=exact", "NAME:key=value"]),
        (("check", "gone.json"), ["gone.json", "file not found"]),
        (("check", "work.yaml"), ["work.yaml", "workload", "missing"]),
        (("simulate", "work.yaml"), ["work.yaml", "missing"]),
        (("report", "."), ["result.json", "muxtune demo"]),
        (("list", "nonsense"), ["unknown kind 'nonsense'", "policies"]),
        (("validate", "--suite", "tpu"), ["unknown suite 'tpu'", "cpu"]),
        (("profile", "--workload", "work.yaml", "--out", "p", "--pp", "1,x"), ["--pp 1,x", "1,2"]),
        (("profile", "--workload", "work.yaml", "--out", "p", "--cluster", "1xA40"), ["1xA40", "cpu"]),
        (("execute", "gone.json"), ["gone.json", "file not found"]),
        (("execute", "gone.json", "--device", "tpu"), ["tpu", "cuda"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(folder, capsys, arguments, told):
    assert main(list(arguments)) == 2
    one_line(capsys, *told)
    assert not Path("plan.json").exists()


DECREASING = "dataset,tokenizer,samples,response_share," + ",".join(f"p{i}" for i in range(101))
DECREASING += "\nd,gpt2,10,0.5," + ",".join(str(200 - i) for i in range(101))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (WORKLOAD.replace("gpt2", "gpt9"), ["work.yaml", "unknown model 'gpt9'", "gpt3-2.7b"]),
        (WORKLOAD.replace("sst2", "sst9"), ["tasks.0", "unknown dataset 'sst9'", "openbookqa"]),
        (WORKLOAD.replace("sst2", "table.csv"), ["table.csv", "decreases", "p0=200"]),
        (WORKLOAD.replace("sst2", "gone.csv"), ["gone.csv", "file not found"]),
        (WORKLOAD.replace("samples: 2", "samples: -2"), ["tasks.2", "global_batch_samples=-2", "at least 1"]),
        (WORKLOAD.replace("rank: 16", "rank: high"), ["tasks.1.peft.rank", '"high"']),
        (WORKLOAD.replace("rank: 16", "rang: 16"), ["rang", "unknown key"]),
        (WORKLOAD.replace("lora", "magic"), ["peft", "magic"]),
        (WORKLOAD.replace("task_id: b", "task_id: a"), ["'a'", "2 times"]),
        (WORKLOAD + "  - {task_id: d", ["work.yaml", "line", "malformed YAML"]),
        (WORKLOAD + "model: gpt2\n", ["'model' occurs twice"]),
        ("tasks: []", ["model is missing"]),
        ("[]", ["mapping"]),
    ],
)
def test_wrong_workloads_name_place_value_and_remedy(folder, capsys, text, told):
    Path("work.yaml").write_text(text)
    Path("table.csv").write_text(DECREASING)
    assert main(list(PLAN)) == 2
    one_line(capsys, "work.yaml" if "table.csv" not in told else "table.csv", *told)


def test_errors_of_a_process_show_no_traceback(folder):
    done = isolated(
        "check", "gone.json", code="import sys; from muxtune.experiments.main import main; sys.exit(main(sys.argv[1:]))"
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "muxtune: error: gone.json: file not found\n"


def test_plan_check_simulate_compare(folder, capsys):
    planned = run_json(capsys, *PLAN)
    assert planned["layout"] == "tp=1 pp=2 dp=1"
    assert planned["out"] == "plan.json"
    plan = read_noun(Plan, Path("plan.json"))
    assert plan.predicted is not None
    assert plan.provenance.plan_seconds > 0
    checked = run_json(capsys, "check", "plan.json")
    assert checked["ok"]
    assert checked["plan_digest"] == planned["plan_digest"]
    simulated = run_json(capsys, "simulate", "plan.json", "--trace", "trace.json", "--out", "sim")
    assert ROW_KEYS | {
        "per_task",
        "timeline_digest",
        "events",
        "events_per_cpu_s",
        "stages_simulated",
        "stages_reused",
    } <= set(simulated)
    assert simulated["iteration_ns"] == planned["iteration_ns"] == plan.predicted.iteration_ns
    assert set(simulated["per_task"]) == {"a", "b", "c"}
    assert json.loads(Path("trace.json").read_text())["traceEvents"]
    assert json.loads(Path("sim/simulate.json").read_text())["timeline_digest"] == simulated["timeline_digest"]
    drawn = {path.name for path in Path("sim").glob("*.svg")}
    assert drawn == {"pipeline.svg", "clock.svg", "memory.svg", "stalls.svg"}
    assert sum(simulated["stalls"].values()) == pytest.approx(1)
    compared = run_json(capsys, "compare", *PLAN[1:5], "--policies", "hf-peft,muxtune", "--out", "cmp")
    assert {"workload", "cluster", "cost_model", "rows"} <= set(compared)
    assert compared["cost_model"]["id"] == "roofline"
    assert not compared["cost_model"]["calibrated"]
    assert compared["cost_model"]["why"].startswith("auto: ")
    rows = {r["policy"]: r for r in compared["rows"]}
    assert all(set(r) >= ROW_KEYS for r in rows.values())
    assert rows["muxtune"]["iteration_ns"] == planned["iteration_ns"]
    assert [r["iteration_ns"] for r in compared["rows"]] == sorted(r["iteration_ns"] for r in compared["rows"])
    assert compared["best"] == compared["rows"][0]["policy"]
    assert {"name", "status", "bound_ns", "gap"} <= set(rows["muxtune"]["solver"])
    assert rows["hf-peft"]["solver"] is None
    assert sorted(p.name for p in Path("cmp").iterdir()) == [
        "compare.json",
        "compare.svg",
        "plan-1-hf-peft.json",
        "plan-2-muxtune.json",
    ]


def test_slowdown_counts_from_step_to_step(folder, capsys):
    """hf-peft runs tasks one after the other: the share of the others in an iteration is a task's slowdown."""
    make_plan_file(policy="hf-peft")
    capsys.readouterr()
    row = run_json(capsys, "simulate", "plan.json")
    alone_ns = [row["iteration_ns"] / task["slowdown"] for task in row["per_task"].values()]
    assert sum(alone_ns) == pytest.approx(row["iteration_ns"], rel=0.01)


def test_tables_flag_what_was_not_measured(folder, capsys):
    make_plan_file()
    assert "wrote plan.json" in capsys.readouterr().out
    for arguments in (["simulate", "plan.json"], ["compare", *PLAN[1:5], "--policies", "temporal,sl-peft"]):
        assert main(arguments) == 0
        lines = capsys.readouterr().out.strip().splitlines()
        assert "UNCALIBRATED" in lines[0]
        assert lines[-1].startswith("uncalibrated:")


def test_same_command_gives_the_same_plan(folder):
    first, second = (read_noun(Plan, Path(make_plan_file(name))) for name in ("one.json", "two.json"))
    assert canonical_bytes(first) == canonical_bytes(second)
    texts = [json.loads(Path(name).read_text()) for name in ("one.json", "two.json")]
    assert [t.pop("provenance").keys() for t in texts]
    assert texts[0] == texts[1]


def test_policy_of_ones_own(folder, capsys):
    body = run_json(capsys, *PLAN[:-1], "./mine.py:MyPolicy")
    assert body["policy"] == "./mine.py:MyPolicy"
    plan = read_noun(Plan, Path("plan.json"))
    assert [h.tasks for h in plan.instances[0].htasks] == [("a",), ("b", "c")]


def test_a_policy_that_fails_is_a_row(folder, capsys):
    body = run_json(capsys, "compare", *PLAN[1:5], "--policies", "hf-peft", "--policy", "./mine.py:Broken")
    good, broken = body["rows"]
    assert good["feasible"]
    assert not broken["feasible"]
    assert "KeyError at mine.py:" in broken["reason"]
    assert set(broken) == set(good)
    assert broken["iteration_ns"] is None


def test_infeasible_is_exit_1_with_its_reason(folder, capsys):
    Path("work.yaml").write_text(WORKLOAD.replace("gpt2", "llama2-70b"))
    body = run_json(capsys, *PLAN, code=1)
    assert not body["feasible"]
    assert "does not fit" in body["reason"]
    assert main(list(PLAN)) == 1
    one_line(capsys, "does not fit", "A40 has 48.0 GiB")
    assert not Path("plan.json").exists()
    body = run_json(capsys, "compare", *PLAN[1:5], "--policies", "hf-peft,muxtune", code=1)
    assert body["best"] is None
    assert all("does not fit" in r["reason"] for r in body["rows"])


def test_check_lists_every_problem(folder, capsys):
    data = json.loads(Path(make_plan_file()).read_text())
    data["instances"][0]["devices"] = [0, 7]
    data["instances"][0]["microbatches"] = 0
    Path("bad.json").write_text(json.dumps(data))
    capsys.readouterr()
    assert main(["check", "bad.json"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "device 7 is not in cluster 2xA40" in lines[0]
    assert run_json(capsys, "check", "bad.json", code=1)["problems"] == lines
    assert main(["simulate", "bad.json"]) == 1
    one_line(capsys, "device 7", "microbatches=0")


def test_check_shows_peaks_of_every_rank(folder, capsys):
    plan = make_plan_file()
    capsys.readouterr()
    assert main(["check", plan]) == 0
    assert capsys.readouterr().out.startswith("ok\n")
    body = run_json(capsys, "check", plan)
    assert set(body["peak_bytes"]) == {"0", "1"}
    assert all(0 < peak < body["memory_bytes"] for peak in body["peak_bytes"].values())


def test_memory_is_shown_by_kind(folder, capsys):
    plan = make_plan_file()
    capsys.readouterr()
    row = run_json(capsys, "simulate", plan)
    assert [m["rank"] for m in row["memory"]] == [0, 1]
    for rank, found in enumerate(row["memory"]):
        assert sum(found["footprint"].values()) == found["peak_bytes"] == row["peak_bytes_per_rank"][rank]
        assert found["moment"].startswith(("during forward of bucket", "during backward of bucket"))
        assert 0 < found["time_ns"] < row["iteration_ns"]
    assert row["paper_peak_bytes"] == max(row["paper_peak_bytes_per_rank"])
    checked = run_json(capsys, "check", plan)["memory"]
    assert checked == [{k: v for k, v in found.items() if k != "time_ns"} for found in row["memory"]]
    assert main(["simulate", plan]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("optimizer states", "activations", "rounding", "peak by Eq. 5"))


def test_recomputation_takes_less_memory_and_more_time(folder, capsys):
    rows = [run_json(capsys, *PLAN, "--recompute", choice) for choice in ("none", "full")]
    assert [r["recompute"] for r in rows] == ["none", "full"]
    assert rows[0]["peak_bytes"] > rows[1]["peak_bytes"]
    assert rows[0]["iteration_ns"] < rows[1]["iteration_ns"]


def test_list_shows_every_kind(capsys):
    body = run_json(capsys, "list")
    kinds = "policies cluster-policies objectives models devices datasets traces cost-models peft profiles"
    assert list(body) == kinds.split()
    assert {"hf-peft", "muxtune"} <= {r["name"] for r in body["policies"]}
    assert run_json(capsys, "list", "peft") == {"peft": body["peft"]}
    assert main(["list", "devices"]) == 0
    assert "H100" in capsys.readouterr().out


def test_policies_split_at_commas_but_not_inside_options():
    assert split_policies("a,b:k=1,l=2,c") == ("a", "b:k=1,l=2", "c")
    assert split_policies("./mine.py:P:k=x:y,b") == ("./mine.py:P:k=x:y", "b")
    assert split_policies("") == ()
    with pytest.raises(InputError, match="follows no policy"):
        split_policies("a,k=1")
    with pytest.raises(InputError, match=r"--policies ,: names no policy"):
        split_policies(",")


def test_pipeline_depths():
    assert parse_degrees("2, 1,2", "--pp") == (2, 1)
    with pytest.raises(InputError, match="--pp 0"):
        parse_degrees("0", "--pp")


def test_json_has_null_where_a_number_is_none():
    assert json.loads(json_text({"a": float("nan"), "b": [float("inf"), 1.5]})) == {"a": None, "b": [None, 1.5]}


def test_tables_show_markup_as_text(capsys):
    text = render("[red]line[/red]", table(["na[b]me", "n"], [["[bold]x[/bold]", "1"], [":smile:", "20"]]))
    assert "[red]line[/red]" in text
    assert "[bold]x[/bold]" in text
    assert ":smile:" in text


@pytest.mark.dist
def test_execute_runs_what_was_planned(folder, capsys):
    Path("work.yaml").write_text(WORKLOAD.replace("gpt2", "tiny-test"))
    make_plan_file(cluster="2xcpu")
    capsys.readouterr()
    body = run_json(capsys, "execute", "plan.json", "--iterations", "2", "--out", "run")
    wanted = {
        "device",
        "ranks",
        "iterations",
        "iteration_ns",
        "billed_tokens_per_s",
        "peak_bytes",
        "losses",
        "plan_digest",
    }
    assert wanted <= set(body)
    assert (body["device"], body["ranks"], body["iterations"]) == ("cpu", 2, 2)
    assert body["iteration_ns"]["p20"] <= body["iteration_ns"]["p50"] <= body["iteration_ns"]["p80"]
    assert {task: len(losses) for task, losses in body["losses"].items()} == {"a": 2, "b": 2, "c": 2}
    assert len(set(body["program_digests"])) == 2
    assert json.loads(Path("run/trace.json").read_text())["traceEvents"]
    assert [x["rank"] for x in body["memory"]] == [0, 1]
    assert all(x["backbone_bytes"] + x["adapter_bytes"] < x["peak_bytes"] for x in body["memory"])


def test_execute_refuses_what_is_not_here(folder, capsys):
    make_plan_file(cluster="64xA40")
    capsys.readouterr()
    assert main(["execute", "plan.json", "--device", "cuda"]) == 2
    one_line(capsys, "--device cuda", "12 GPUs", "--device cpu")


def test_interrupt_is_one_line_and_exit_130(folder, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("muxtune.experiments.commands.check.run", interrupted)
    assert main(["check", "plan.json"]) == 130
    assert capsys.readouterr().err == "muxtune: error: interrupted\n"


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["megatron"] = None
from muxtune.experiments.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_planning_needs_no_torch_and_execution_says_so(folder):
    done = isolated("compare", *PLAN[1:5], "--policies", "hf-peft", "--json", code=WITHOUT_TORCH)
    assert (done.returncode, done.stderr) == (0, "plan: 1/1\n")
    done = isolated("execute", "plan.json", code=WITHOUT_TORCH)
    assert done.returncode == 2
    assert done.stderr == "muxtune: error: needs torch: pip install 'muxtune[exec]'\n"


def test_a_reader_that_leaves_early_is_no_error():
    code = "import os, sys; from muxtune.experiments.main import main; os.close(0); sys.exit(main(['list']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


BROKEN = """
from dataclasses import replace
from muxtune.policies.base import Policy, make_policy

class Boom(Policy):
    def plan(self, state):
        return {}["nothing"]

class Cheat(Policy):
    def plan(self, state):
        workload = replace(state.workload, tasks=state.workload.tasks[:1])
        return make_policy("temporal", self.cost).plan(replace(state, workload=workload))
"""


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("Boom", 2, "policy Boom failed with KeyError at broken.py:7"),
        ("Cheat", 1, "policy Cheat: its plan has another workload or cluster than it was given"),
    ],
)
def test_a_broken_policy_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, code: int, text: str
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "w.yaml").write_text(
        "model: tiny-llama\ntasks:\n  - {task_id: a, dataset: sst2, global_batch_samples: 2, peft: {kind: lora}}\n"
        "  - {task_id: b, dataset: sst2, global_batch_samples: 2, peft: {kind: lora}}\n"
    )
    monkeypatch.chdir(tmp_path)
    found = main(["plan", "--workload", "w.yaml", "--cluster", "cpu", "--policy", f"broken.py:{name}"])
    error = capsys.readouterr().err
    assert found == code
    assert text in error
    assert "Traceback" not in error
