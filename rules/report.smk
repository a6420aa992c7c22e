rule summarize:
    input:
        needs("summarize", *MATRIX_RESULTS, *CONTROL_ANSWER),
    output:
        table=report(
            LAYOUT.table,
            caption="../workflow/report/table.rst",
            category="Answers",
            labels={"what": "every evaluation, as a table"},
        ),
        text=report(
            LAYOUT.text,
            caption="../workflow/report/summary.rst",
            category="Answers",
            labels={"what": "summary"},
        ),
        verdicts=report(
            LAYOUT.verdicts,
            caption="../workflow/report/verdicts.rst",
            category="Answers",
            labels={"what": "verdicts with their intervals"},
        ),
    log:
        LAYOUT.log("summarize"),
    localrule: True
    conda:
        "../workflow/environment.yml"
    params:
        config=expected.params_summary(config),
        config_files=CONFIG_FILES,
        criteria=CRITERIA,
        state=existing("summarize", LAYOUT.read_by_summary),
    script:
        "../workflow/scripts/summarize.py"


rule plot_perplexity_by_step:
    input:
        [LAYOUT.evaluation(run.name).results for run in runs.evaluations(CONFIG)],
    output:
        figure=report(
            LAYOUT.perplexity_by_step,
            caption="../workflow/report/perplexity_by_step.rst",
            category="Figures",
            labels={"what": "perplexity by inner step"},
        ),
    log:
        LAYOUT.log("plot_perplexity_by_step"),
    localrule: True
    conda:
        "../workflow/environment.yml"
    script:
        "../workflow/scripts/plot_perplexity_by_step.py"


rule report:
    input:
        needs("report", *MATRIX_ARTEFACTS, *CONTROL_ANSWER, *TRACK_B_ARTEFACTS),
    output:
        page=report(
            LAYOUT.report,
            caption="../workflow/report/report.rst",
            category="Answers",
            labels={"what": "the report"},
        ),
    log:
        LAYOUT.log("report"),
    localrule: True
    conda:
        "../workflow/environment.yml"
    params:
        config=expected.params_summary(config),
        criteria=CRITERIA,
        state=existing("report", LAYOUT.read_by_report),
    script:
        "../workflow/scripts/report.py"
