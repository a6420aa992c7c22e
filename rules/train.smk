rule train_phase:
    input:
        tokens=rules.tokenize_corpus.output,
        base="results/base/model",
        parent=parent_sidecar,
        proof=zero_init_proof,
    output:
        sidecar=directory("results/runs/{key}/sidecar"),
        logs="results/runs/{key}/train_logs.parquet",
        summary=report(
            "results/runs/{key}/train_summary.json",
            caption="../workflow/report/training.rst",
            category="Trainings",
            subcategory=lambda wildcards: f"phase {TRAININGS[wildcards.key].phase}",
            labels=training_labels,
        ),
    log:
        "results/logs/train_phase/{key}.log",
    priority: 10  # the long jobs first, so that the short ones fill the gaps
    conda:
        "../environment.yml"
    resources:
        gpu=config["resources"]["gpus_per_run"],
    params:
        arm=lambda wildcards: TRAININGS[wildcards.key].arm,
        phase=lambda wildcards: TRAININGS[wildcards.key].phase,
        seed=lambda wildcards: TRAININGS[wildcards.key].seed,
        settings=lambda wildcards: config["training"][TRAININGS[wildcards.key].phase],
        recursive=lambda wildcards: phase_overrides(config, TRAININGS[wildcards.key].phase),
        key=lambda wildcards: wildcards.key,
        load={k: config["base"][k] for k in ("dtype", "trust_remote_code")},
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/train_phase.py"
