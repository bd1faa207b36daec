"""OpenAI's API in front of a served model: HTTP and JSON on one side, Triton Inference Server's gRPC on the other."""
