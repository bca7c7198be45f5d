"""`run_demo`: source, tied, healed and control, one after the other, the figures of all four, and an audit.

Each stage leaves a folder that is complete or can be continued: a run that was killed goes on where it was, and one
that is repeated trains nothing and measures again.
"""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import CONFIG_NAME, AutoTokenizer

from transformers_tiedmoe.audit.config import AuditConfig
from transformers_tiedmoe.audit.run import RESULT as AUDIT_RESULT
from transformers_tiedmoe.audit.run import audit
from transformers_tiedmoe.cards import CardConfig, write_card
from transformers_tiedmoe.files import check_apart, read_json
from transformers_tiedmoe.output_place import was_renamed
from transformers_tiedmoe.run_folder import Folder
from transformers_tiedmoe.training.arguments import TiedMoeTrainingArguments
from transformers_tiedmoe.training.data import load_blocks
from transformers_tiedmoe.training.heal import REPORT as HEAL_REPORT
from transformers_tiedmoe.training.heal import heal
from transformers_tiedmoe.workdir import discard_folder, discard_work, open_folder

from .config import VALIDATION_FRACTION, DemoConfig
from .figures import measure
from .page import markdown
from .plot import save_plot
from .train_source import train_source

Progress = Callable[[int, int, str], None]
FOLDERS = ("source", "tied", "healed", "control")
AUDITED = ("source", "tied", "healed")
AUDIT = "audit"
AUDIT_TOKENS = 8192  # of the held-out text
CONVERSION = "conversion.json"


def run_demo(config: DemoConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Run the main job and write `report.json`, `report.md` and `report.png` into `config.output`, and the audit of
    source, tied and healed into its folder `audit`, of which the card of `healed` tells.

    Args:
        config: what to run.
        progress: called as `progress(done, total, what)`.

    Returns:
        What `report.json` holds: for each of `source`, `tied`, `healed` and `control` what `measure` returns;
        `conversion`, the plan's summary; `training`, by model its steps, tokens and seconds; `seconds` by stage, those
        of an earlier run that this one continues included; `settings`, `versions` and `machine`.

    Raises:
        ValueError: the output folder holds something else, or what a stage refuses, such as a source without experts.
    """
    check_apart(config.output, {"source": config.source, "data": config.data})
    with open_folder(
        config.output,
        {"settings": config.settings()},
        what="a demo",
        advice="give another folder, or --overwrite to begin anew",
        overwrite=config.overwrite,
    ) as work:
        if config.overwrite:
            _discard_stages(config)
        return _run(config, work, progress or (lambda done, total, what: None))


def _run(config: DemoConfig, work: Folder, progress: Progress) -> dict[str, Any]:
    run = _Run(config, work, progress)
    source, source_training = run.stage("source", run.source)
    conversion = run.stage("tied", run.tie, source)
    training = {
        "source": source_training,
        "healed": run.stage("healed", run.heal, config.path("tied"), str(source) if config.distill else None),
        "control": run.stage("control", run.heal, source),
    }
    folders = {"source": source, **{name: config.path(name) for name in FOLDERS[1:]}}
    figures = run.stage("figures", run.measure, folders)
    run.stage("audit", run.audit, {name: folders[name] for name in AUDITED})
    report = {
        **figures,
        "conversion": conversion,
        "training": training,
        "seconds": {**run.seconds, "total": round(sum(run.seconds.values()), 2)},
        "settings": config.settings(),
        "versions": {name: version(name) for name in ("transformers-tiedmoe", "transformers", "torch", "tokenizers")},
        "machine": {"machine": platform.machine(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
    }
    work.write_text("report.md", markdown(report))
    with work.draft() as draft:
        save_plot(report, draft / "report.png")
    work.write_json("report.json", report)
    return report


def _discard_stages(config: DemoConfig) -> None:
    """Delete what killed stages of another demo have left unfinished."""
    from tiedmoe_conversion.folders import hidden_statistics

    for name in (*FOLDERS, AUDIT):
        discard_work(config.path(name))
    discard_folder(hidden_statistics(config.path("tied")))


class _Run:
    """The stages of one run; each says how far it is, and `seconds` how long it took."""

    def __init__(self, config: DemoConfig, work: Folder, progress: Progress):
        self.config, self.work, self.progress = config, work, progress
        self.seconds = dict(work.values.get("seconds", {}))
        self.seconds.pop("figures", None)  # always taken anew
        self.current = ""

    def stage(self, name: str, run: Callable, *args):
        """Run `run(*args)`, timed and named."""
        self.current, start = name, time.perf_counter()
        try:
            return run(*args)
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 2)
            self.work.remember("seconds", self.seconds)

    def tell(self, done: int, total: int, what: str) -> None:
        """Report progress within the current stage."""
        self.progress(done, total, f"{self.current}: {what}")

    def source(self) -> tuple[Path, dict | None]:
        """Return the folder of the source and, unless the user named it, the report of its training."""
        config = self.config
        if config.source is None:
            folder = config.path("source")
            return folder, train_source(config, folder, self.tell)
        folder = Path(config.source)
        return folder if folder.is_dir() else Path(snapshot_download(config.source)), None

    def tie(self, source: Path) -> dict:
        """Convert the source; returns the plan's summary."""
        from tiedmoe_conversion import METHODS, ConversionRecipe, execute, make_plan

        config = self.config
        if self.work.is_sound(CONVERSION) and config.path("tied", CONFIG_NAME).is_file():
            return read_json(config.path(CONVERSION))
        method = METHODS.get(config.method)  # the recipe refuses an unknown one
        needs_text = method is not None and method.calibration(**config.method_options)
        recipe = ConversionRecipe(
            source=str(source),
            output=str(config.path("tied")),
            group_size=config.group_size,
            skip_first=config.skip_first,
            skip_last=config.skip_last,
            method=config.method,
            method_options=config.method_options,
            calibration=config.text if needs_text else None,
            calibration_tokens=config.calibration_tokens,
            calibration_block_size=config.block_size,
            measure=False,  # done below, on more text
            seed=config.seed,
        )
        if config.path("tied").is_dir() and not was_renamed(config.path("tied")):  # its report is lost: made again
            self.work.delete("tied")
        report = execute(make_plan(recipe), progress=self.tell)
        self.work.write_json(CONVERSION, report)
        return report

    def heal(self, model: Path, teacher: str | None = None) -> dict:
        """Train the same extra steps for the tied model and for the control, into the folder named as the stage is."""
        config, folder = self.config, self.config.path(self.current)
        if (folder / HEAL_REPORT).is_file():
            report = read_json(folder / HEAL_REPORT)
        else:
            options = TiedMoeTrainingArguments(
                model=str(model),
                data=config.text,
                output_dir=str(folder),
                teacher=teacher,
                max_steps=config.heal_steps,
                learning_rate=config.heal_learning_rate,
                per_device_train_batch_size=config.batch_size,
                block_size=config.block_size,
                validation_fraction=VALIDATION_FRACTION,
                allow_worse=True,  # the report shows it; the control may get worse by more of the same text
                seed=config.seed,
            )
            report = heal(options, self.tell)
        self.work.own(self.current)
        return {key: report[key] for key in ("steps", "tokens", "seconds", "before", "after")}

    def measure(self, folders: dict[str, Path]) -> dict[str, dict]:
        """Return the figures of every model, read back from its folder."""
        config = self.config
        tokenizer = AutoTokenizer.from_pretrained(folders["source"])
        _, validation = load_blocks(config.text, tokenizer, config.block_size, VALIDATION_FRACTION)
        figures = {}
        for i, (name, folder) in enumerate(folders.items()):
            self.tell(i, len(folders), f"measuring {name}")
            figures[name] = measure(folder, tokenizer, validation, config)
        return figures

    def audit(self, folders: dict[str, Path]) -> None:
        """Audit models into the folder `audit`, and tell of it in the healed one's card, unless an earlier run has."""
        config, output = self.config, self.config.path(AUDIT)
        if not (output / AUDIT_RESULT).is_file() or was_renamed(output):
            source, *models = map(str, folders.values())
            audit(
                AuditConfig(
                    models=models,
                    source=source,
                    data=[f"novels={config.text}" if config.data is None else config.text],
                    output=str(output),
                    share=VALIDATION_FRACTION,
                    num_tokens=AUDIT_TOKENS,
                    block_size=config.block_size,
                    batch_size=config.batch_size,
                    context=config.block_size,
                    train_block_size=config.block_size,
                    strategy=False,  # which layers need experts of their own takes longer than the demo
                    seed=config.seed,
                ),
                self.tell,
            )
            healed = str(folders["healed"])
            write_card(CardConfig(healed, audit=str(output), output=healed))
        self.work.own(AUDIT)
