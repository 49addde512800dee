"""`python -m mpdeploy.report.schemas`: write the published schemas anew."""

from mpdeploy.report.schemas import write_schemas

for path in write_schemas():
    print(path)
