"""The server: engines that passed the gates answer requests over the Open Inference Protocol (V2).

dtypes, messages       what flows: tensors by their names on the wire, requests, answers, errors
protocol, wire         the REST codec: JSON and binary tensors; what the server says of itself
app, page              HTTP: routes over plain ASGI, and a page for people
connection, server     uvicorn around them: slow and oversized peers, signals, an orderly end
workers, shared        several processes behind one port, and what they share
manager, repository    models by name, their versions, hot reload
selection, loading     which engine of a run may be served, and making it ready
contract, batcher      what a model takes, and requests into batches
instance, version      an engine on its thread, and a version made of such
watching               shadow comparison and recording of requests
statistics, metrics    counters, and their names for Prometheus
logs, tracing          JSON logs, access log, OpenTelemetry
grpc_*, triton_server, package/    the gRPC door, tritonserver in our place, packages for servers that scale out
"""
