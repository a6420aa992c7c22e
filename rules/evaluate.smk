rule evaluate:
    input:
        tokens=rules.tokenize_corpus.output,
        base="results/base/model",
        model=evaluated_model,
    output:
        results=report(
            "results/eval/{name}_results.json",
            caption="../workflow/report/evaluation.rst",
            category="Evaluations",
            subcategory=lambda wildcards: evaluation_labels(wildcards)["stage"],
            labels=evaluation_labels,
        ),
        documents="results/eval/{name}_documents.parquet",
    log:
        "results/logs/evaluate/{name}.log",
    conda:
        "../environment.yml"
    resources:
        gpu=GPUS,
    params:
        stage=lambda wildcards: EVALUATIONS[wildcards.name].stage,
        evaluation=config["evaluation"],
        recursive=evaluated_config,
        depths=evaluated_depths,
        upstream=upstream_settings(config),
        load={k: config["base"][k] for k in ("dtype", "trust_remote_code")},
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/evaluate.py"


rule compare_zero_init:
    input:
        tokens=rules.tokenize_corpus.output,
        base="results/base/model",
        surgery=lambda wildcards: f"results/surgery/s{ZERO_INIT[wildcards.proof]}",
        baseline_results="results/eval/baseline_results.json",
        baseline_documents="results/eval/baseline_documents.parquet",
        surgery_results=lambda wildcards: (
            f"results/eval/{surgery_name(ZERO_INIT[wildcards.proof])}_results.json"
        ),
        surgery_documents=lambda wildcards: (
            f"results/eval/{surgery_name(ZERO_INIT[wildcards.proof])}_documents.parquet"
        ),
    output:
        proof=report(
            "results/compare/{proof}.json",
            caption="../workflow/report/zero_init.rst",
            category="Proofs",
            labels=lambda wildcards: {
                "what": "zero-init changes nothing",
                "seed": str(ZERO_INIT[wildcards.proof]),
            },
        ),
    log:
        "results/logs/compare_zero_init/{proof}.log",
    conda:
        "../environment.yml"
    resources:
        gpu=GPUS,
    params:
        evaluation=config["evaluation"],
        load={k: config["base"][k] for k in ("dtype", "trust_remote_code")},
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/compare_zero_init.py"


if REPEATED:

    rule compare_repeat:
        input:
            sidecars=expand("results/runs/{key}/sidecar", key=[REPEATED_OF.key, REPEATED.key]),
            logs=expand(
                "results/runs/{key}/train_logs.parquet", key=[REPEATED_OF.key, REPEATED.key]
            ),
            documents=expand(
                "results/eval/{name}_documents.parquet",
                name=[REPEATED_OF.stage, REPEATED_EVALUATION.name],
            ),
        output:
            comparison=report(
                "results/compare/repeat.json",
                caption="../workflow/report/repeat.rst",
                category="Proofs",
                labels={"what": "a run and its repeat", "seed": str(REPEATED_OF.seed)},
            ),
        log:
            "results/logs/compare_repeat.log",
        conda:
            "../environment.yml"
        params:
            key=REPEATED_OF.key,
        script:
            "../workflow/scripts/compare_repeat.py"
