rule summarize:
    input:
        summarized,
    output:
        table=report(
            "results/summary.csv",
            caption="../workflow/report/table.rst",
            category="Answers",
            labels={"what": "every evaluation, as a table"},
        ),
        text=report(
            "results/summary.txt",
            caption="../workflow/report/summary.rst",
            category="Answers",
            labels={"what": "summary"},
        ),
        verdicts=report(
            "results/verdicts.json",
            caption="../workflow/report/verdicts.rst",
            category="Answers",
            labels={"what": "verdicts with their intervals"},
        ),
    log:
        "results/logs/summarize.log",
    conda:
        "../environment.yml"
    params:
        config=config,
        state=existing("summarize", "eval/*.*", "compare/*.*", "runs/*/*.*", "logs/*/*.log"),
    script:
        "../workflow/scripts/summarize.py"


rule plot_perplexity_by_step:
    input:
        expand("results/eval/{name}_results.json", name=MATRIX),
    output:
        figure=report(
            "results/figures/perplexity_by_step.png",
            caption="../workflow/report/perplexity_by_step.rst",
            category="Figures",
            labels={"what": "perplexity by inner step"},
        ),
    log:
        "results/logs/plot_perplexity_by_step.log",
    conda:
        "../environment.yml"
    script:
        "../workflow/scripts/plot_perplexity_by_step.py"


rule report:
    input:
        reported,
    output:
        page=report(
            "results/report.html",
            caption="../workflow/report/report.rst",
            category="Answers",
            labels={"what": "the report"},
        ),
    log:
        "results/logs/report.log",
    conda:
        "../environment.yml"
    params:
        config=config,
        state=existing(
            "report",
            "base/train_logs.parquet",
            "eval/*.*",
            "compare/*.*",
            "runs/*/*.*",
            "runs/*/work/metrics",
            "track_b/references.parquet",
            "track_b/students/*/*.parquet",
            "track_b/students/*/logs/*",
            "logs/**/*.log",
        ),
    script:
        "../workflow/scripts/report.py"
