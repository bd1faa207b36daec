"""OpenAI's API in front of a served model: HTTP and JSON on one side, Triton Inference Server on the other."""
