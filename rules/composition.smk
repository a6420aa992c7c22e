# The positive control: the matrix over a task that one pass cannot solve.
module composition_matrix:
    snakefile:
        "matrix.smk"
    config:
        COMPOSITION


use rule * from composition_matrix as composition_*


rule compare_composition:
    input:
        artefacts.matrix_results(CONTROL, CONTROL.layout),
    output:
        table=report(
            LAYOUT.composition_table,
            caption="../workflow/report/composition.rst",
            category="Answers",
            labels={"what": "the positive control, by hops and inner step"},
        ),
        answer=LAYOUT.composition_answer,
        figure=report(
            LAYOUT.composition_figure,
            caption="../workflow/report/composition.rst",
            category="Figures",
            labels={"what": "composition by hops and inner step"},
        ),
    log:
        LAYOUT.log("compare_composition"),
    localrule: True
    conda:
        "../workflow/environment.yml"
    params:
        config=expected.params_summary(COMPOSITION),
        defaults=str(DEFAULTS),
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/compare_composition.py"
