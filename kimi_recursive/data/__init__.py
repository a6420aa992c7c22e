"""Text: corpora, tokens, windows."""

from kimi_recursive.doors import offer

__getattr__, __dir__ = offer(
    __name__,
    corpus="read_documents split_documents prepare_corpus",
    tokens="train_tokenizer tokenize_corpus load_tokens TokenSplit",
    windows="Window WindowSampler document_windows validation_windows",
)
