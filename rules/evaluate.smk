rule evaluate:
    input:
        tokens=rules.tokenize_corpus.output,
        base=LAYOUT.base.model,
        model=lambda wildcards: artefacts.model_of(CONFIG, evaluation(wildcards), LAYOUT),
    output:
        results=report(
            LAYOUT.evaluation("{name}").results,
            caption="../workflow/report/evaluation.rst",
            category="Evaluations",
            subcategory=lambda wildcards: runs.evaluation_labels(CONFIG, evaluation(wildcards))[
                "stage"
            ],
            labels=lambda wildcards: runs.evaluation_labels(CONFIG, evaluation(wildcards)),
        ),
        documents=LAYOUT.evaluation("{name}").documents,
    log:
        LAYOUT.log("evaluate", "{name}"),
    conda:
        "../workflow/environment.yml"
    resources:
        gpu=CONFIG.resources.gpus_per_evaluation,
    params:
        stage=lambda wildcards: evaluation(wildcards).stage,
        evaluation=CONFIG.evaluation.to_dict(),
        recursive=lambda wildcards: expected.params_evaluate(CONFIG, evaluation(wildcards)),
        depths=lambda wildcards: expected.evaluated_depths(CONFIG, evaluation(wildcards)),
        upstream=expected.upstream(CONFIG),
        load=LOAD,
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/evaluate.py"


if TASKS:

    rule evaluate_tasks:
        input:
            corpus=LAYOUT.corpus.split("test"),
            tasks=artefacts.harness_files(CONFIG),
            base=LAYOUT.base.model,
            model=lambda wildcards: artefacts.model_of(CONFIG, evaluation(wildcards), LAYOUT),
        output:
            results=report(
                LAYOUT.tasks("{name}", "{step}").results,
                caption="../workflow/report/tasks.rst",
                category="Tasks",
                subcategory=lambda wildcards: evaluation(wildcards).stage,
                labels=lambda wildcards: {
                    **runs.evaluation_labels(CONFIG, evaluation(wildcards)),
                    "inner step": wildcards.step,
                },
            ),
            samples=LAYOUT.tasks("{name}", "{step}").samples,
        log:
            LAYOUT.log("evaluate_tasks", "{name}_step_{step}"),
        conda:
            "../workflow/environment.yml"
        resources:
            gpu=CONFIG.resources.gpus_per_evaluation,
        params:
            stage=lambda wildcards: evaluation(wildcards).stage,
            tasks=CONFIG.evaluation.tasks.numeric(),
            upstream=expected.upstream(CONFIG),
            load=LOAD,
            numerics=NUMERICS_VERSION,
        script:
            "../workflow/scripts/evaluate_tasks.py"


rule compare_zero_init:
    input:
        tokens=rules.tokenize_corpus.output,
        base=LAYOUT.base.model,
        surgery=lambda wildcards: LAYOUT.surgery(ZERO_INIT[wildcards.proof].name),
    output:
        proof=report(
            LAYOUT.proof("{proof}"),
            caption="../workflow/report/zero_init.rst",
            category="Proofs",
            labels=lambda wildcards: {
                "what": "zero-init changes nothing",
                "seed": ZERO_INIT[wildcards.proof].label,
            },
        ),
    log:
        LAYOUT.log("compare_zero_init", "{proof}"),
    priority: 20  # all trainings wait for it
    conda:
        "../workflow/environment.yml"
    resources:
        gpu=CONFIG.resources.gpus_per_evaluation,
    params:
        load=LOAD,
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/compare_zero_init.py"


if CONFIG.repeat:
    REPEATED, REPEAT = runs.trainings(CONFIG)[0], runs.repeated(CONFIG)

    rule compare_repeat:
        input:
            sidecars=[LAYOUT.run(run.key).sidecar for run in (REPEATED, REPEAT)],
            logs=[LAYOUT.run(run.key).logs for run in (REPEATED, REPEAT)],
            documents=[
                LAYOUT.evaluation(name).documents
                for name in (REPEATED.stage, runs.repeated_evaluation(CONFIG).name)
            ],
        output:
            comparison=report(
                LAYOUT.repeat,
                caption="../workflow/report/repeat.rst",
                category="Proofs",
                labels={"what": "a run and its repeat", "seed": str(REPEATED.seed)},
            ),
        log:
            LAYOUT.log("compare_repeat"),
        localrule: True
        conda:
            "../workflow/environment.yml"
        params:
            key=REPEATED.key,
        script:
            "../workflow/scripts/compare_repeat.py"
