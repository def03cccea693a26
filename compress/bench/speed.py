"""`compress bench speed`: how fast plain transformers runs checkpoints, beside the model they were made of."""

from dataclasses import asdict
from pathlib import Path

from compress.commands import find_model, pick_device
from compress.eval.speed import SpeedProtocol, measure_speed
from compress.progress import Reporter
from compress.report import Report, table


def bench_speed(checkpoints: list[str], baseline: str, protocol: SpeedProtocol, device: str) -> Report:
    """Time each checkpoint and the baseline in turns. Names are aliases, hub ids or folders.

    Raises InputError for one that cannot be timed (eval/speed.py).
    """
    reporter, device = Reporter(), pick_device(device)
    names = [baseline, *checkpoints]
    folders: list[Path] = [find_model(name, None, reporter) for name in names]
    with reporter.stage("speed, turn", len(names) * (protocol.repeats + 1)) as stage:
        measured = measure_speed(folders, protocol, device, stage.step)
    found = {name: speed.beside(measured[0]) for name, speed in zip(names, measured, strict=True)}
    rows = [
        [
            name,
            f"{speed['prefill_tokens_per_second']:.0f}",
            f"{speed['prefill_speedup']:.2f}",
            f"{speed['decode_ms_per_token']:.2f}",
            f"{speed['decode_speedup']:.2f}",
        ]
        for name, speed in found.items()
    ]
    columns = ["checkpoint", "prompt, tokens/s", "x baseline", "then, ms a token", "x baseline"]
    data = {"baseline": baseline, "protocol": asdict(protocol), "speed": found}
    closing = f"median of {protocol.repeats} turns; x baseline: times as fast as {baseline}"
    return Report(data, [table("", columns, rows), closing])
