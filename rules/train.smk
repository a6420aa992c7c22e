rule train_phase:
    input:
        tokens=rules.tokenize_corpus.output,
        base=LAYOUT.base.model,
        parent=lambda wildcards: artefacts.parent_of(CONFIG, training(wildcards), LAYOUT),
        # Made of what the training is made of, so that nothing else retrains.
        proof=lambda wildcards: artefacts.proof_of(CONFIG, training(wildcards), LAYOUT),
    output:
        sidecar=directory(LAYOUT.run("{key}").sidecar),
        logs=LAYOUT.run("{key}").logs,
        summary=report(
            LAYOUT.run("{key}").summary,
            caption="../workflow/report/training.rst",
            category="Trainings",
            subcategory=lambda wildcards: f"phase {training(wildcards).phase}",
            labels=lambda wildcards: runs.training_labels(training(wildcards)),
        ),
    log:
        LAYOUT.log("train_phase", "{key}"),
    priority: 10  # the long jobs first, so that the short ones fill the gaps
    conda:
        "../workflow/environment.yml"
    resources:
        gpu=CONFIG.resources.gpus_per_run,
    params:
        arm=lambda wildcards: training(wildcards).arm,
        phase=lambda wildcards: training(wildcards).phase,
        seed=lambda wildcards: training(wildcards).seed,
        settings=lambda wildcards: expected.params_train_phase(CONFIG, training(wildcards)),
        recursive=lambda wildcards: expected.overrides(CONFIG, training(wildcards)),
        key=lambda wildcards: wildcards.key,
        load=LOAD,
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/train_phase.py"
