if CONFIG.corpus.task:

    rule make_task:
        output:
            folder=directory(LAYOUT.task),
        log:
            LAYOUT.log("make_task"),
        localrule: True
        conda:
            "../workflow/environment.yml"
        params:
            task=expected.params_make_task(CONFIG),
            numerics=NUMERICS_VERSION,
        script:
            "../workflow/scripts/make_task.py"


rule prepare_corpus:
    input:
        LAYOUT.task if CONFIG.corpus.task else CORPUS_FILES,
    output:
        **artefacts.split_files(CONFIG, LAYOUT.corpus),
    log:
        LAYOUT.log("prepare_corpus"),
    priority: 20  # as in every rule here: the whole matrix waits for them
    conda:
        "../workflow/environment.yml"
    params:
        corpus=expected.params_prepare_corpus(CONFIG),
        source=artefacts.source_of(CONFIG, LAYOUT),
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/prepare_corpus.py"


rule tokenize_corpus:
    input:
        corpus=rules.prepare_corpus.output,
        tokenizer=artefacts.tokenizer_of(CONFIG, LAYOUT),
    output:
        **artefacts.split_files(CONFIG, LAYOUT.tokens),
    log:
        LAYOUT.log("tokenize_corpus"),
    priority: 20
    conda:
        "../workflow/environment.yml"
    params:
        append_eos=CONFIG.corpus.append_eos,
        trust_remote_code=CONFIG.base.trust_remote_code,
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/tokenize_corpus.py"


if SCRATCH:

    rule train_tokenizer:
        input:
            corpus=rules.prepare_corpus.output,
        output:
            tokenizer=directory(LAYOUT.tokenizer),
        log:
            LAYOUT.log("train_tokenizer"),
        priority: 20
        conda:
            "../workflow/environment.yml"
        params:
            tokenizer=asdict(CONFIG.tokenizer),
            numerics=NUMERICS_VERSION,
        script:
            "../workflow/scripts/train_tokenizer.py"

    rule train_base:
        input:
            tokens=rules.tokenize_corpus.output,
            tokenizer=rules.train_tokenizer.output.tokenizer,
        output:
            model=directory(LAYOUT.base.model),
            logs=LAYOUT.base.logs,
        log:
            LAYOUT.log("train_base"),
        priority: 20
        conda:
            "../workflow/environment.yml"
        resources:
            gpu=1,
        params:
            base=expected.params_train_base(CONFIG),
            numerics=NUMERICS_VERSION,
        script:
            "../workflow/scripts/train_base.py"

else:

    rule fetch_base:
        input:
            LOCAL_BASE,
        output:
            model=directory(LAYOUT.base.model),
        log:
            LAYOUT.log("fetch_base"),
        localrule: True  # needs a network, which the nodes of a cluster may not have
        conda:
            "../workflow/environment.yml"
        params:
            base=expected.params_fetch_base(CONFIG),
        script:
            "../workflow/scripts/fetch_base.py"


rule insert_cells:
    input:
        model=LAYOUT.base.model,
    output:
        sidecar=directory(LAYOUT.surgery("{cells}")),
    log:
        LAYOUT.log("insert_cells", "{cells}"),
    priority: 20
    conda:
        "../workflow/environment.yml"
    params:
        recursive=lambda wildcards: expected.params_insert_cells(
            CONFIG.variant(SURGERIES[wildcards.cells].variant)
        ),
        load=LOAD,
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/insert_cells.py"
