"""The rule of the planners' suite: `python -m tests.suite_rule` writes experiments/data/suite/*.yaml again.

Three devices by five sizes: on each GPU three workloads, on the CPU two, numbers of tasks in turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "experiments" / "data" / "suite"
TASKS = (2, 4, 8, 16, 32, 64)
SIZES = (1, 2, 4, 8, 16)
CLUSTERS = {1: "1x{}", 2: "2x{}", 4: "4x{}", 8: "8x{}", 16: "2x8x{}-ib"}
MODELS = {1: "gpt3-2.7b", 2: "gpt3-2.7b", 4: "llama2-7b", 8: "llama2-7b", 16: "llama2-13b"}
DATASETS = ("sst2", "openbookqa", "rte")
RANKS, BATCHES = (4, 8, 16, 64), (4, 8, 16, 32)
EQUAL_RANK, EQUAL_BATCH = 8, 16
#: (tp, pp, dp): a pipeline over all devices, the same with tensor parallelism, and a small layout that leaves room beside it.
PIPELINE = {1: (1, 1, 1), 2: (1, 2, 1), 4: (1, 4, 1), 8: (1, 8, 1), 16: (2, 8, 1)}
TENSOR = {1: (1, 1, 1), 2: (2, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1), 16: (2, 4, 2)}
SMALL = {1: (1, 1, 1), 2: (1, 1, 1), 4: (1, 1, 1), 8: (1, 2, 1), 16: (1, 4, 1)}
#: The tiny model of the CPU has four layers.
CPU_PIPELINE = {**PIPELINE, 8: (2, 4, 1), 16: (2, 4, 2)}


def rule() -> Iterator[tuple[str, str]]:
    """(file name, text) of every instance."""
    for d, device in enumerate(("A40", "H100", "cpu")):
        for s, size in enumerate(SIZES):
            for variant in (0, 1, 2) if device != "cpu" else (0, 2):
                tasks = TASKS[(s + 2 * variant + d) % len(TASKS)]
                mixed, ranks, batches = variant > 0, variant == 2 or (variant == 1 and s % 2 == 0), variant == 2
                pipeline = CPU_PIPELINE if device == "cpu" else PIPELINE
                layouts = dict.fromkeys((TENSOR[size] if variant == 1 else pipeline[size], SMALL[size]))
                kind = f"{'mixed' if mixed else 'uniform'}-{'skewed' if ranks or batches else 'equal'}"
                name = f"{device.lower()}-{size:02d}-{kind}-{tasks:02d}"
                cluster = f"{size}xcpu" if device == "cpu" else CLUSTERS[size].format(device)
                yield (
                    f"{name}.yaml",
                    "".join(
                        f"{line}\n"
                        for line in (
                            f"name: {name}",
                            f"cluster: {cluster}",
                            "layouts:",
                            *(f"- {{tp: {tp}, pp: {pp}, dp: {dp}}}" for tp, pp, dp in layouts),
                            f"microbatches: {4 if size <= 2 else 8}",
                            f"model: {'tiny-llama' if device == 'cpu' else MODELS[size]}",
                            "tasks:",
                            *_groups(tasks, mixed, ranks, batches),
                        )
                    ),
                )


def _groups(tasks: int, mixed: bool, ranks: bool, batches: bool) -> Iterator[str]:
    """Tasks of one type as a line with their number."""
    types = Counter(
        (
            DATASETS[i % 3] if mixed else "openbookqa",
            RANKS[i // 3 % 4] if ranks else EQUAL_RANK,
            BATCHES[i // 2 % 4] if batches else EQUAL_BATCH,
        )
        for i in range(tasks)
    )
    for number, ((dataset, rank, batch), count) in enumerate(types.items()):
        yield (
            f"- {{task_id: {chr(97 + number)}, count: {count}, dataset: {dataset}, global_batch_samples: {batch}, "
            f"peft: {{kind: lora, rank: {rank}}}}}"
        )


def main() -> None:
    """Write every file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in rule():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
