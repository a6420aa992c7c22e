if CONFIG.track_b["teacher"]["kind"] == "vectors":

    rule import_vectors:
        input:
            CONFIG.track_b["teacher"]["path"],
        output:
            teacher=directory(LAYOUT.track_b.teacher),
        log:
            LAYOUT.log("import_vectors"),
        conda:
            "../workflow/environment.yml"
        params:
            teacher=CONFIG.track_b["teacher"],
            split=expected.params_sentences(CONFIG),
            numerics=NUMERICS_VERSION,
        script:
            "../workflow/scripts/import_vectors.py"

else:

    rule prepare_sentences:
        input:
            CORPUS_FILES,
        output:
            sentences=LAYOUT.track_b.sentences,
        log:
            LAYOUT.log("prepare_sentences"),
        conda:
            "../workflow/environment.yml"
        params:
            corpus={"source": CONFIG.corpus.source, "text_field": CONFIG.corpus.text_field},
            split=expected.params_sentences(CONFIG),
            numerics=NUMERICS_VERSION,
        script:
            "../workflow/scripts/prepare_sentences.py"

    rule encode_sentences:
        input:
            sentences=rules.prepare_sentences.output.sentences,
        output:
            teacher=directory(LAYOUT.track_b.teacher),
        log:
            LAYOUT.log("encode_sentences"),
        priority: 20  # everything else of Track-B waits for it
        conda:
            "../workflow/environment.yml"
        resources:
            gpu=1,
        params:
            teacher=CONFIG.track_b["teacher"],
            numerics=NUMERICS_VERSION,
        script:
            "../workflow/scripts/encode_sentences.py"


rule find_neighbours:
    input:
        teacher=LAYOUT.track_b.teacher,
    output:
        neighbours=LAYOUT.track_b.neighbours,
    log:
        LAYOUT.log("find_neighbours"),
    priority: 20
    conda:
        "../workflow/environment.yml"
    params:
        settings=neighbour_settings(TRACK_B),
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/find_neighbours.py"


rule check_sanity:
    input:
        teacher=LAYOUT.track_b.teacher,
        neighbours=rules.find_neighbours.output.neighbours,
    output:
        checks=LAYOUT.track_b.sanity,
    log:
        LAYOUT.log("check_sanity"),
    priority: 20
    conda:
        "../workflow/environment.yml"
    params:
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/check_sanity.py"


rule evaluate_references:
    input:
        teacher=LAYOUT.track_b.teacher,
        neighbours=rules.find_neighbours.output.neighbours,
    output:
        table=LAYOUT.track_b.references,
    log:
        LAYOUT.log("evaluate_references"),
    conda:
        "../workflow/environment.yml"
    params:
        dims=sorted({e.settings["dim"] for e in TRACK_B}),
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/evaluate_references.py"


rule train_student:
    input:
        teacher=LAYOUT.track_b.teacher,
        neighbours=rules.find_neighbours.output.neighbours,
        checks=rules.check_sanity.output.checks,
    output:
        logs=LAYOUT.track_b.student("{student}").logs,
        best=LAYOUT.track_b.student("{student}").best,
        scores=LAYOUT.track_b.student("{student}").scores,
    log:
        LAYOUT.log("train_student", "{student}"),
    priority: 10
    conda:
        "../workflow/environment.yml"
    resources:
        gpu=1,
    params:
        settings=lambda wildcards: STUDENTS[wildcards.student][0],
        seed=lambda wildcards: STUDENTS[wildcards.student][1],
        name=lambda wildcards: wildcards.student,
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/train_student.py"


TRACK_B_SUMMARY = LAYOUT.track_b_summary(CONFIG.track_b["quick"])


rule summarize_track_b:
    input:
        needs("summarize_track_b", *TRACK_B_ARTEFACTS),
    output:
        table=TRACK_B_SUMMARY.table,
        text=report(
            TRACK_B_SUMMARY.text,
            caption="../workflow/report/track_b.rst",
            category="Track-B",
            labels={"what": "summary"},
        ),
        comparison=report(
            TRACK_B_SUMMARY.comparison,
            caption="../workflow/report/track_b_comparison.rst",
            category="Track-B",
            labels={"what": "students and references, as a table"},
        ),
        pairs=report(
            TRACK_B_SUMMARY.pairs,
            caption="../workflow/report/track_b_pairs.rst",
            category="Track-B",
            labels={"what": "experiments that differ in one setting, as a table"},
        ),
        runs=directory(TRACK_B_SUMMARY.runs),
        figure=report(
            TRACK_B_SUMMARY.figure,
            caption="../workflow/report/track_b_figure.rst",
            category="Track-B",
            labels={"what": "recall by step"},
        ),
    log:
        LAYOUT.log("summarize_track_b"),
    localrule: True  # too light for a job of its own on a cluster
    conda:
        "../workflow/environment.yml"
    params:
        track_b=CONFIG.track_b,
        state=existing("summarize_track_b", LAYOUT.read_by_track_b),
    script:
        "../workflow/scripts/summarize_track_b.py"
