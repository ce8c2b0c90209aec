"""What `dax explain` found out, for people."""

from dax.bench.report import table


def text(result: dict) -> str:
    """The object for people."""
    pixels = f"{result['height']}x{result['width']}x{result['num_frames']}"
    control = f" and {result['control_blocks']} control blocks" if result["control_blocks"] else ""
    lines = [
        f"{result['model']}: {result['layers']} layers{control}, {result['parameters'] / 1e9:.3f} G parameters",
        f"{pixels} = {result['tokens']} tokens, {result['steps']} steps",
        f"memory of the transformer: weights {result['weights_gib']:.2f} GiB, activations about "
        f"{result['activations_gib']:.2f} GiB" + (f", of {result['memory_gib']:.0f}" if result["memory_gib"] else ""),
        *expert_lines(result),
        *size_lines(result),
        "",
        "plan",
    ]
    for key, entry in result["plan"].items():
        asked = "" if entry["asked"] == entry["value"] else f" (asked: {entry['asked']})"
        lines.append(f"  {key} = {entry['value']}{asked}, from {entry['from']}")
    lines += [f"  {change}" for change in result["changes"]]
    lines += schedule_lines(result)
    lines += [f"  note: {note}" for note in result["notes"]]
    lines += [f"  fallback: {fallback}" for fallback in result["fallbacks"]]
    where = f"on {result['hardware']}" if result["hardware"] else "no card named: --hardware h200 gives times"
    lines += ["", f"one forward of one branch, {where}"]
    columns = {"name": "part", "dtype": "dtype", "count": "count", "gflop": "GFLOP", "gb": "GB"}
    if result["hardware"]:
        columns |= {"ms_at_least": "ms at least", "bound": "bound", "ms_expected": "ms expected"}
    lines.append(table(result["parts"], columns))
    forward, video = result["forward"], result["video"]
    if result["hardware"]:
        lines.append(f"layer: expected {result['ms_per_layer_expected']:.4g} ms")
    lines.append(f"forward: {forward['tflop']:.4g} TFLOP" + times(forward))
    lines.append(f"video: {video['forwards']} forwards, {video['pflop']:.4g} PFLOP" + times(video))
    if result["gains"]:
        rows = [{**found, "setting": f"{found['key']} = {str(found['value']).lower()}"} for found in result["gains"]]
        columns = {"setting": "with that alone", "seconds_expected": "s a clip", "times": "times as fast"}
        lines += ["", "what another setting would make of it, expected", table(rows, columns)]
    if result["ranks"]:
        head = f"{result['num_ranks']} ranks, {result['ranks_per_node']} per node: expected, the plan's own way first"
        columns = {
            "topology": "topology",
            "chunks": "chunks",
            "window_gib": "window GiB",
            "layer_ms": "ms/layer",
            "exchange_ms": "exchange ms",
        }
        columns |= {"exposed_ms": "exposed ms", "denoise_s": "denoise s", "speedup": "times one", "efficiency_pct": "%"}
        lines += ["", head, table(result["ranks"], columns)]
        if result["num_ranks"] > 2 and any(row["window_gib"] for row in result["ranks"]):
            lines.append("rows with a window rest on a rate that was measured on two GPUs alone: docs/parallelism.md")
    return "\n".join(lines)


def expert_lines(result: dict) -> list[str]:
    """How two experts share loop and memory."""
    experts = result["experts"]
    if experts is None:
        return []
    (first, second), forwards = experts["steps"], experts["forwards"]
    host = experts["host_weights_gib"]
    return [
        f"two experts: {first} steps down to the boundary at {experts['boundary_ratio']:g}, then {second}; "
        f"{forwards[0]} and {forwards[1]} forwards",
        f"memory with both: weights {experts['device_weights_gib']:.2f} GiB on the device, with activations and the "
        f"text's keys about {result['device_gib']:.2f} GiB" + (f"; {host:.2f} GiB of the host's" if host else ""),
    ]


def size_lines(result: dict) -> list[str]:
    """That one card is too small for the transformer alone, where it is."""
    needs, has = result["device_gib"], result["memory_gib"]
    if has is None or result["num_ranks"] > 1 or needs <= has:
        return []
    return [f"it does not fit: about {needs:.1f} GiB with the text's keys, of {has:.0f}"]


def schedule_lines(result: dict) -> list[str]:
    """The step cache's table: 1 a computed step, 0 a predicted one, - one without guidance."""
    cached = result["step_cache"]
    if cached is None:
        unknown = result["plan"]["cache.policy"]["value"] != "none"
        said = "the time embedding decides, so it takes weights to know them; counted as if all were computed"
        return [f"  steps: {said}"] if unknown else []
    total = 2 * len(cached["cond"])
    lines = [f"  steps: {cached['made_by']}: {sum(cached['computed'].values())} of {total} forwards are computed"]
    return lines + [f"    {branch:6} {cached[branch]}  {count}" for branch, count in cached["computed"].items()]


def times(found: dict) -> str:
    if found["seconds_at_least"] is None:
        return ""
    return f", at least {found['seconds_at_least']:.4g} s, expected {found['seconds_expected']:.4g} s"
