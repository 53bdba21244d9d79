"""From a checked request to running choices: the pipeline that all APIs go through."""
