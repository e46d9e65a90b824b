"""Training and test data: shards written and read, utterances cut into batches."""
