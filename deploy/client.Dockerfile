# A site: the library and the client role, at the versions of constraints.txt. Nothing of the coordinator is in it.
#   docker build -f deploy/client.Dockerfile -t fedcompose-client .
# Without a GPU, gigabytes less:  --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
FROM python:3.11-slim AS build
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY fedcompose fedcompose
COPY client client
RUN python -m venv /opt/fedcompose \
 && /opt/fedcompose/bin/pip install --no-cache-dir -c constraints.txt torch hatchling \
 && /opt/fedcompose/bin/pip install --no-cache-dir -c constraints.txt --no-build-isolation '.[model]' ./client

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home fedcompose
COPY --from=build /opt/fedcompose /opt/fedcompose
ENV PATH=/opt/fedcompose/bin:$PATH \
    FEDCOMPOSE_HOME=/site/.fedcompose \
    OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
USER fedcompose
WORKDIR /site
ENTRYPOINT ["fedcompose"]
CMD ["client", "join"]
