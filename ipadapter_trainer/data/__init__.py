"""Images, captions and face embeddings -> batches; and the check of a data set."""
