"""The GPU benchmark's verdicts and tables, from results alone: nothing here runs a kernel."""

from collections.abc import Iterator

from peers import RECOMPUTE, TIEDMOE, TRANSFORMERS

# Measured on an H100 before the kernels were written; the bar is set against them.
BAR_DEVICE = "H100"
# liger-kernel 0.7.0 on an H100, fused_moe in its repository's benchmark/data (2026-04-02): 2.096, 7.342, 9.548, 28.225 ms.
# Its "full" adds nothing to a gradient that is there; our step does.
LIGER_RELEASED = (("forward", 8192, 295), ("forward", 32768, 337), ("step", 8192, 194), ("step", 32768, 263))


def bar(results: list[dict], device: str) -> list[dict]:
    """The bar of the kernels' issue, line by line: `needed`, `found` and a `verdict` of pass, fail or not measured.

    Its speeds are set for an H100; on another device the verdict says so.
    """
    speed = list(_speed(results))
    if BAR_DEVICE not in device:
        for line in speed:
            if line["verdict"] != "not measured":
                line["verdict"] += f" (set for {BAR_DEVICE}, this is {device or 'a CPU'})"
    return [*speed, *_memory(results), *_against_peers(results), *_correctness(results)]


def _line(what: str, needed: str, found: float | None, passed, unit: str = "") -> dict:
    if found is None:
        return {"line": what, "needed": needed, "found": "", "verdict": "not measured"}
    return {
        "line": what,
        "needed": needed,
        "found": f"{found:.4g} {unit}".strip(),
        "verdict": "pass" if passed(found) else "fail",
    }


def entry(results: list[dict], kind: str, T: int, g: int = 1, peer: str = TIEDMOE, shape: str = "OLMoE") -> dict:
    """What was measured of a peer at uniform routing; empty if it was not."""
    for result in results:
        described = (result.get("kind"), result.get("T"), result.get("g"), result.get("routing"))
        if described == (kind, T, g, "uniform") and result["shape"]["name"] == shape:
            found = result["peers"].get(peer, {})
            return found if found.get("status") == "measured" else {}
    return {}


def _speed(results: list[dict]) -> Iterator[dict]:
    forward = entry(results, "forward", 8192).get("tflops")
    yield _line("forward, OLMoE T=8192", ">= 450 TFLOP/s", forward, lambda x: x >= 450, "TFLOP/s")
    step = entry(results, "step", 8192, 4).get("tflops")
    what = "forward + backward of a group of 4, accumulation included, OLMoE T=8192"
    yield _line(what, ">= 400 TFLOP/s", step, lambda x: x >= 400, "TFLOP/s")
    for T, microseconds in ((1, 48), (8, 252), (32, 378)):
        decode = entry(results, "decode", T)
        needed = f">= 70 % of copy bandwidth ({microseconds} us at 3.0 TB/s)"
        fraction = 100 * decode["fraction_of_copy"] if decode else None
        unit = f"% ({decode['ms']['median'] * 1e3:.0f} us)" if decode else ""
        yield _line(f"decode, OLMoE T={T}", needed, fraction, lambda x: x >= 70, unit)
    for kind, T, released in LIGER_RELEASED:
        ours = entry(results, kind, T, shape="Qwen3-30B").get("tflops")
        what = f"Liger's released figure, {kind}, Qwen3-30B T={T}"
        yield _line(what, f"> {released} TFLOP/s", ours, lambda x, least=released: x > least, "TFLOP/s")
    traffic = entry(results, "step", 8192, 4).get("gradient_traffic", {}).get("ms_per_layer")
    yield _line(
        "traffic of the pool's gradient, group of 4, OLMoE T=8192",
        "< 0.2 ms a layer",
        traffic,
        lambda x: x < 0.2,
        "ms",
    )


def _memory(results: list[dict]) -> Iterator[dict]:
    for peer, megabytes in ((TIEDMOE, 302), (RECOMPUTE, 34)):
        saved = entry(results, "step", 8192, 4, peer).get("saved_bytes")
        found = None if saved is None else round(saved / 1e6)
        what = f"saved for the backward by one layer, {peer}, OLMoE T=8192"
        yield _line(what, f"<= {megabytes} MB", found, lambda x, most=megabytes: x <= most, "MB")


def _against_peers(results: list[dict]) -> Iterator[dict]:
    ratios = {result["key"]: best_of(result, TRANSFORMERS) for result in results if result["peers"]}
    ratios = {key: best for key, best in ratios.items() if best}
    slowest = min(ratios, key=lambda key: ratios[key][1]) if ratios else None
    found = ratios[slowest][1] if slowest else None
    what = f"never slower than transformers' best, {len(ratios)} cases measured"
    if slowest:
        what += f"; closest: {slowest}, {ratios[slowest][0]}"
    yield _line(what, ">= 1 x", found, lambda x: x >= 1, "x")
    for peer in ("liger", "sonicmoe"):
        for kind, g in (("forward", 1), ("step", 4)):
            over = entry(results, kind, 8192, g, peer).get("time_over_tiedmoe", {}).get("median")
            yield _line(
                f"{peer} in this run, {kind}, OLMoE T=8192: its time over ours", "> 1 x", over, lambda x: x > 1, "x"
            )


def _correctness(results: list[dict]) -> Iterator[dict]:
    ours = [result["peers"][TIEDMOE] for result in results if TIEDMOE in result["peers"]]
    ran = [each for each in ours if each["status"] in ("measured", "wrong", "failed")]
    bad = sum(each["status"] != "measured" for each in ran)
    yield _line(
        f"right against float64, {len(ran)} cases", "0 wrong or failed", bad if ran else None, lambda x: x == 0
    )
    errors = [error for each in ours for error in each.get("errors", {}).values() if error is not None]
    yield _line("largest relative error", "< 2e-2", max(errors, default=None), lambda x: x < 2e-2)
    syncs = [each["host_syncs"] for each in ours if each.get("host_syncs") is not None]
    yield _line("host synchronisations in a call", "0", max(syncs, default=None), lambda x: x == 0)


def best_of(result: dict, names: tuple[str, ...]) -> tuple[str, float] | None:
    """The fastest of the named peers and its time over ours (median of paired ratios); None if either was not measured."""
    over = {name: result["peers"].get(name, {}).get("time_over_tiedmoe", {}).get("median") for name in names}
    measured = {name: ratio for name, ratio in over.items() if ratio is not None}
    return min(measured.items(), key=lambda item: item[1]) if measured else None


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(report: dict) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    lines = [f"# Expert kernels on {report['machine'].get('device', 'a CPU')}", ""]
    if report["smoke_test"]:
        lines += [
            "**A smoke test on a CPU with tiny shapes: it shows that the script runs. Its figures mean nothing.**",
            "",
        ]
    lines += [
        f"{report['date']}, `{report['command']}`, {report['minutes']:.1f} minutes. {machine}.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in report['versions'].items())}.",
        "",
    ]
    if report["rates"]:
        first, last = report["rates"][0], report["rates"][-1]
        lines += [
            f"bf16 matrix product {first['matmul_tflops']:.4g} TFLOP/s, copy {first['copy_tb_per_s']:.3g} TB/s at the start; "
            f"{last['matmul_tflops']:.4g} and {last['copy_tb_per_s']:.3g} at the end. Fractions are of the first.",
            "",
        ]
    lines += ["## The bar", "", "| | needed | found | |", "|---|---|---:|---|"]
    lines += [f"| {each['line']} | {each['needed']} | {each['found']} | {each['verdict']} |" for each in report["bar"]]
    lines += ["", *_summary(report["cases"]), "", *_details(report["cases"]), "", *_not_measured(report)]
    return "\n".join(lines).rstrip() + "\n"


def _summary(results: list[dict]) -> list[str]:
    peers = ("liger", "sonicmoe", "deepgemm")
    lines = [
        "## Cases",
        "",
        "A step is two microbatches, forward and backward, of a whole tied group, with the gradients accumulated. The right",
        "columns are another's time over ours, the median of paired rounds: above 1 ours is faster.",
        "",
        "| case | tiedmoe, ms | TFLOP/s or TB/s | of the machine | transformers' best | " + " | ".join(peers) + " |",
        "|---|---:|---:|---:|---|" + "---:|" * len(peers),
    ]
    for result in results:
        ours = result["peers"].get(TIEDMOE, {})
        best = best_of(result, TRANSFORMERS)
        others = [result["peers"].get(name, {}).get("time_over_tiedmoe") for name in peers]
        cells = [
            result["key"],
            *_speed_cells(ours),
            f"{best[0]}: {best[1]:.2f}" if best else "",
            *(f"{other['median']:.2f}" if other else "" for other in others),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _speed_cells(found: dict) -> list[str]:
    if "ms" not in found:
        return [found.get("status", ""), "", ""]
    rate = f"{found['tflops']:.4g} TFLOP/s" if "tflops" in found else f"{found['tb_per_s']:.3g} TB/s"
    fraction = found.get("fraction_of_matmul", found.get("fraction_of_copy"))
    return [
        f"{found['ms']['median']:.3f} ({found['ms']['p20']:.3f}-{found['ms']['p80']:.3f})",
        rate,
        f"{fraction:.0%}",
    ]


def _details(results: list[dict]) -> list[str]:
    lines = [
        "## Every peer",
        "",
        "| case | peer | ms (p20-p80) | rate | of the machine | its time over ours (p20-p80) | saved, MB | peak, MB | host syncs | largest error |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        for name, found in result["peers"].items():
            if "ms" not in found:
                continue
            over = found.get("time_over_tiedmoe")
            errors = [error for error in found["errors"].values() if error is not None]
            cells = [
                result["key"],
                name
                + (" (WRONG)" if found["status"] == "wrong" else "")
                + (" *" if found["how"].startswith("no graph") else ""),
                *_speed_cells(found),
                f"{over['median']:.2f} ({over['p20']:.2f}-{over['p80']:.2f})" if over else "",
                *(
                    f"{found[key] / 1e6:.1f}" if found.get(key) is not None else ""
                    for key in ("saved_bytes", "peak_bytes")
                ),
                "" if found.get("host_syncs") is None else str(found["host_syncs"]),
                f"{max(errors):.1e}" if errors else "not finite",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "\\* decoding without a CUDA graph; the JSON file says why."]


def _not_measured(report: dict) -> list[str]:
    reasons: dict[tuple[str, str, str], int] = {}
    for result in report["cases"]:
        for name, found in result["peers"].items():
            if found["status"] != "measured":
                key = (name, found["status"], found["reason"])
                reasons[key] = reasons.get(key, 0) + 1
    lines = ["## Not measured", ""]
    lines += [f"- {name}, {status} in {n} cases: {reason}" for (name, status, reason), n in sorted(reasons.items())]
    lines += [f"- {result['key']}: {result['error']}" for result in report["cases"] if "error" in result]
    lines += [f"- {remark}" for remark in report["remarks"]]
    if report["left_out"]:
        lines.append(f"- no time left for {len(report['left_out'])} cases: {'; '.join(report['left_out'])}")
    return lines if len(lines) > 2 else []
