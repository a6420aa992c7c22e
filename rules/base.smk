rule prepare_corpus:
    input:
        CORPUS_FILES,
    output:
        train="results/corpus/train.parquet",
        validation="results/corpus/validation.parquet",
        test="results/corpus/test.parquet",
        facts="results/corpus/corpus.json",
    log:
        "results/logs/prepare_corpus.log",
    conda:
        "../environment.yml"
    params:
        corpus=config["corpus"],
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/prepare_corpus.py"


rule tokenize_corpus:
    input:
        corpus=rules.prepare_corpus.output,
        tokenizer=TOKENIZER,
    output:
        train="results/tokens/train.parquet",
        validation="results/tokens/validation.parquet",
        test="results/tokens/test.parquet",
        facts="results/tokens/tokens.json",
    log:
        "results/logs/tokenize_corpus.log",
    conda:
        "../environment.yml"
    params:
        trust_remote_code=config["base"]["trust_remote_code"],
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/tokenize_corpus.py"


if SCRATCH:

    rule train_tokenizer:
        input:
            corpus=rules.prepare_corpus.output,
        output:
            tokenizer=directory("results/tokenizer"),
        log:
            "results/logs/train_tokenizer.log",
        conda:
            "../environment.yml"
        params:
            vocab_size=config["tokenizer"]["vocab_size"],
            numerics=NUMERICS_VERSION,
        script:
            "../workflow/scripts/train_tokenizer.py"

    rule train_base:
        input:
            tokens=rules.tokenize_corpus.output,
            tokenizer=rules.train_tokenizer.output.tokenizer,
        output:
            model=directory("results/base/model"),
            logs="results/base/train_logs.parquet",
        log:
            "results/logs/train_base.log",
        conda:
            "../environment.yml"
        resources:
            gpu=1,
        params:
            base={k: config["base"][k] for k in ("seed", "architecture", "training")},
            numerics=NUMERICS_VERSION,
        script:
            "../workflow/scripts/train_base.py"

else:

    rule fetch_base:
        input:
            LOCAL_BASE,
        output:
            model=directory("results/base/model"),
        log:
            "results/logs/fetch_base.log",
        localrule: True  # in need of a network, which nodes of a cluster may not have
        conda:
            "../environment.yml"
        params:
            base={k: config["base"][k] for k in ("path", "hub_id", "revision", "trust_remote_code")},
        script:
            "../workflow/scripts/fetch_base.py"


rule insert_cells:
    input:
        model="results/base/model",
    output:
        sidecar=directory("results/surgery/s{seed}"),
    log:
        "results/logs/insert_cells/s{seed}.log",
    conda:
        "../environment.yml"
    params:
        recursive=recursive_subset(config, MODEL_KEYS),
        load={k: config["base"][k] for k in ("dtype", "trust_remote_code")},
        numerics=NUMERICS_VERSION,
    script:
        "../workflow/scripts/insert_cells.py"
