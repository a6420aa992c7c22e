if config["track_b"]["teacher"]["kind"] == "vectors":

    rule import_vectors:
        input:
            config["track_b"]["teacher"]["path"],
        output:
            teacher=directory("results/track_b/teacher"),
        log:
            "results/logs/import_vectors.log",
        conda:
            "../environment.yml"
        params:
            teacher=config["track_b"]["teacher"],
            split={k: config["track_b"][k] for k in SENTENCE_KEYS},
            numerics=NUMERICS_VERSION,
        script:
            "../workflow/scripts/import_vectors.py"

else:

    rule prepare_sentences:
        input:
            CORPUS_FILES,
        output:
            sentences="results/track_b/sentences.parquet",
        log:
            "results/logs/prepare_sentences.log",
        conda:
            "../environment.yml"
        params:
            corpus={k: config["corpus"][k] for k in ("source", "text_field")},
            split={k: config["track_b"][k] for k in SENTENCE_KEYS},
            numerics=NUMERICS_VERSION,
        script:
            "../workflow/scripts/prepare_sentences.py"

    rule encode_sentences:
        input:
            sentences=rules.prepare_sentences.output.sentences,
        output:
            teacher=directory("results/track_b/teacher"),
        log:
            "results/logs/encode_sentences.log",
        priority: 20  # everything else of Track-B waits for it
        conda:
            "../environment.yml"
        resources:
            gpu=1,
        params:
            teacher=config["track_b"]["teacher"],
            numerics=NUMERICS_VERSION,
        script:
            "../workflow/scripts/encode_sentences.py"


rule find_neighbours:
    input:
        teacher="results/track_b/teacher",
    output:
        neighbours="results/track_b/neighbours.npz",
    log:
        "results/logs/find_neighbours.log",
    priority: 20
    conda:
        "../environment.yml"
    params:
        settings=NEIGHBOUR_SETTINGS,
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/find_neighbours.py"


rule check_sanity:
    input:
        teacher="results/track_b/teacher",
        neighbours=rules.find_neighbours.output.neighbours,
    output:
        checks="results/track_b/sanity.json",
    log:
        "results/logs/check_sanity.log",
    priority: 20
    conda:
        "../environment.yml"
    params:
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/check_sanity.py"


rule evaluate_references:
    input:
        teacher="results/track_b/teacher",
        neighbours=rules.find_neighbours.output.neighbours,
    output:
        table="results/track_b/references.parquet",
    log:
        "results/logs/evaluate_references.log",
    conda:
        "../environment.yml"
    params:
        dims=REFERENCE_DIMS,
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/evaluate_references.py"


rule train_student:
    input:
        teacher="results/track_b/teacher",
        neighbours=rules.find_neighbours.output.neighbours,
        checks=rules.check_sanity.output.checks,
    output:
        logs="results/track_b/students/{student}/logs/train_logs.parquet",
        best="results/track_b/students/{student}/checkpoints/student_best.safetensors",
        scores="results/track_b/students/{student}/evaluation.parquet",
    log:
        "results/logs/train_student/{student}.log",
    priority: 10
    conda:
        "../environment.yml"
    resources:
        gpu=1,
    params:
        settings=lambda wildcards: STUDENTS[wildcards.student][0],
        seed=lambda wildcards: STUDENTS[wildcards.student][1],
        name=lambda wildcards: wildcards.student,
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/train_student.py"


rule summarize_track_b:
    input:
        summarized_students,
    output:
        table=f"{TRACK_B_DIR}/summary.csv",
        text=report(
            f"{TRACK_B_DIR}/summary.txt",
            caption="../workflow/report/track_b.rst",
            category="Track-B",
            labels={"what": "summary"},
        ),
        comparison=report(
            f"{TRACK_B_DIR}/comparison.csv",
            caption="../workflow/report/track_b_comparison.rst",
            category="Track-B",
            labels={"what": "students and references, as a table"},
        ),
        runs=directory(f"{TRACK_B_DIR}/runs"),
        figure=report(
            f"{TRACK_B_DIR}/recall_by_step.png",
            caption="../workflow/report/track_b_figure.rst",
            category="Track-B",
            labels={"what": "recall by step"},
        ),
    log:
        "results/logs/summarize_track_b.log",
    conda:
        "../environment.yml"
    params:
        track_b=config["track_b"],
        state=existing("summarize_track_b", "track_b/students/*/logs/*", "logs/train_student/*.log"),
    script:
        "../workflow/scripts/summarize_track_b.py"
