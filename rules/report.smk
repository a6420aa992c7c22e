rule summarize:
    input:
        summarized,
    output:
        table="results/summary.csv",
        text="results/summary.txt",
    log:
        "results/logs/summarize.log",
    conda:
        "../environment.yml"
    params:
        config=config,
        state=existing_results,
    script:
        "../workflow/scripts/summarize.py"
