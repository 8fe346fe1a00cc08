"""shrink: from the plan with the worst error to the smallest one that still shows it (delta debugging on tasks and samples)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from muxtune.spec.check import check
from muxtune.spec.plan import Plan
from muxtune.spec.restrict import restrict

#: A smaller plan counts where its error has the same sign and at least this part of the size.
KEPT_ERROR = 0.8
MOST_STEPS = 16

#: Predicts and measures a plan: (predicted_ns, measured_ns, noise).
Trial = Callable[[Plan], tuple[int, int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Smallest:
    """Where the search ended; `steps` plans were measured, `kept` of them accepted."""

    plan: Plan
    predicted_ns: int
    measured_ns: int
    noise: float
    steps: int
    kept: int

    @property
    def error(self) -> float:
        """predicted / measured − 1."""
        return self.predicted_ns / self.measured_ns - 1


def shrink(plan: Plan, trial: Trial, most_steps: int = MOST_STEPS) -> Smallest:
    """Measure the plan again, then ever smaller ones, as long as the error stays above 0.8 of it and above the noise."""
    predicted_ns, measured_ns, noise = trial(plan)
    best = Smallest(plan=plan, predicted_ns=predicted_ns, measured_ns=measured_ns, noise=noise, steps=0, kept=0)
    wanted = KEPT_ERROR * best.error
    steps, going = 0, True
    while going:
        going = False
        for smaller in smaller_plans(best.plan):
            if steps == most_steps:
                break
            steps += 1
            predicted_ns, measured_ns, noise = trial(smaller)
            error = predicted_ns / measured_ns - 1
            if error * wanted > 0 and abs(error) >= max(abs(wanted), noise):
                best = Smallest(
                    plan=smaller,
                    predicted_ns=predicted_ns,
                    measured_ns=measured_ns,
                    noise=noise,
                    steps=steps,
                    kept=best.kept + 1,
                )
                going = True
                break
    return Smallest(
        plan=best.plan,
        predicted_ns=best.predicted_ns,
        measured_ns=best.measured_ns,
        noise=best.noise,
        steps=steps,
        kept=best.kept,
    )


def smaller_plans(plan: Plan) -> Iterator[Plan]:
    """Half of the tasks, the other half, all but one, then half of all samples, of one task's; only those that can run."""
    tasks = [t.task_id for t in plan.workload.tasks]
    samples = {t.task_id: t.global_batch_samples for t in plan.workload.tasks}
    cuts: list[Mapping[str, int]] = []
    if len(tasks) > 1:
        middle = len(tasks) // 2
        cuts += [dict.fromkeys(tasks[middle:], 0), dict.fromkeys(tasks[:middle], 0)]
    if len(tasks) > 2:
        cuts += [{task: 0} for task in tasks]
    if max(samples.values()) > 1:
        cuts.append({task: max(1, count // 2) for task, count in samples.items()})
        cuts += [{task: count // 2} for task, count in samples.items() if count > 1 and len(tasks) > 1]
    for cut in cuts:
        smaller = restrict(plan, cut)
        if not check(smaller):
            yield smaller
