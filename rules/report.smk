rule summarize:
    input:
        summarized,
    output:
        table="results/summary.csv",
        text="results/summary.txt",
    log:
        "results/logs/summarize.log",
    params:
        config=config,
        state=existing_results,
    conda:
        "../environment.yml"
    script:
        "../workflow/scripts/summarize.py"
