"""Loss against bytes for every conversion method, before and after healing: `make study-conversion`.

One source is trained on the novels that ship with the package, or found in OUTPUT/source; every row of
`study/configurations.py` is converted, measured, healed with 5, 25 and 100 % of a fixed budget (5 % of the source's
own training tokens) and measured again. Writes conversion_study.json, .md and .png. Kill it and start it again: runs
that are there are not run again.

    python benchmarks/conversion_study.py --output study --workers 2       # two or three hours on two idle cores
    python benchmarks/conversion_study.py --healing        # `make study-healing`: how near to the source, 1 to 25 %
    python benchmarks/conversion_study.py --output quick --quick --results quick/study    # the whole path in a minute
"""

import dataclasses
from pathlib import Path

import torch
from study.configurations import HEALING_ROWS, QUICK, ROWS
from study.jobs import one_thread, quick_text, run_all, study_parser
from study.runs import Study
from study.summary import GOALS, HEALING_GOALS, figure_of, markdown, summarize
from tables import show, write_results
from timing import about

from tiedmoe_demo import DemoConfig
from tiedmoe_demo.train_source import train_source
from transformers_tiedmoe.workdir import open_folder

SOURCE = {"source_steps": 4200, "source_learning_rate": 6e-3, "balance_by_layer": True, "seed": 0}
HEALING_SHARES = (0.2, 1.0, 5.0)  # of the budget: 1, 5 and 25 % of the source's training tokens
TINY = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "batch_size": 8}
TINY |= {"block_size": 16, "source_steps": 20, "source_learning_rate": 6e-3, "balance_by_layer": True}
TINY_STUDY = {"heal_share": 0.2, "shares": (0.25, 1.0), "calibration_tokens": 256, "num_seeds": 2}


def main(arguments: list[str] | None = None) -> None:
    parser = study_parser(__doc__, "study", "conversion_study")
    parser.add_argument("--healing", action="store_true", help="few rows, healed with up to 25 %% of the tokens")
    options = parser.parse_args(arguments)
    one_thread()
    study, rows, goals = Study(DemoConfig(output=str(options.output), **SOURCE)), ROWS, GOALS
    if options.healing:
        study, rows, goals = dataclasses.replace(study, shares=HEALING_SHARES), HEALING_ROWS, HEALING_GOALS
    if options.quick:
        demo = DemoConfig(output=str(options.output), data=str(options.output / "text.txt"), **TINY)
        study, rows = Study(demo, **TINY_STUDY), QUICK
    identity = {"settings": study.settings()}
    with open_folder(options.output, identity, what="a study", advice="give another --output"):
        if options.quick:
            quick_text(Path(study.demo.text))
        training = train_source(study.demo, study.source, show)  # or finds it
        jobs = [(row, seed) for row in rows for seed in study.seeds(row) if study.missing(row, seed)]
        jobs.sort(key=lambda job: job[1])  # every row at a first seed before any at a second
        run_all(study.run, jobs, options.workers, options.minutes)
        summary = summarize(study, training, [(row, study.results(row)) for row in rows], goals)
        command = f"make study-{'healing' if options.healing else 'conversion'}"
        summary |= {"command": command + (" ARGS=--quick" if options.quick else ""), **about()}
        summary["machine"]["threads of a process"] = torch.get_num_threads()
        write_results(options.results, summary, markdown(summary), figure_of(summary))


if __name__ == "__main__":
    main()
