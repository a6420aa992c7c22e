rule summarize:
    input:
        summarized,
    output:
        table="results/summary.csv",
        text="results/summary.txt",
        verdicts="results/verdicts.json",
    log:
        "results/logs/summarize.log",
    conda:
        "../environment.yml"
    params:
        config=config,
        state=existing_results,
    script:
        "../workflow/scripts/summarize.py"


rule plot_perplexity_by_step:
    input:
        expand("results/eval/{name}_results.json", name=MATRIX),
    output:
        figure="results/figures/perplexity_by_step.png",
    log:
        "results/logs/plot_perplexity_by_step.log",
    conda:
        "../environment.yml"
    script:
        "../workflow/scripts/plot_perplexity_by_step.py"
