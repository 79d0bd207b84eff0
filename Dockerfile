# docker build -t sfu-delegate .
# docker run --read-only --cap-drop=ALL --security-opt=no-new-privileges -v ./sfu-delegate.yaml:/etc/sfu-delegate/sfu-delegate.yaml:ro \
#     -v sfu-delegate:/var/lib/sfu-delegate -p 127.0.0.1:8080:8080 sfu-delegate
ARG BASE_IMAGE=python:3.13-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /build
RUN python3 -m venv /opt/sfu-delegate
# The locked packages in a layer of their own: it is kept until they change.
COPY requirements/run.txt requirements/run.txt
RUN /opt/sfu-delegate/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements/run.txt
COPY pyproject.toml README.md LICENSE ./
COPY sfu_delegate sfu_delegate
# What has installed it is not needed any more, nor can it be used to install something else.
RUN /opt/sfu-delegate/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation . \
 && /opt/sfu-delegate/bin/pip uninstall --yes setuptools pip

FROM ${BASE_IMAGE}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sfu-delegate" \
      org.opencontainers.image.description="Keeps Matrix call memberships alive while the SFU sees their participants, and ends them within seconds of a departure" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Its numbers are fixed, since files that are mounted have to belong to it. The configuration, /tmp and the database's directory can be mounted; all
# else can be read-only.
RUN groupadd --gid 10001 sfu-delegate \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/sfu-delegate --shell /usr/sbin/nologin sfu-delegate \
 && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/sfu-delegate \
 && install --directory /etc/sfu-delegate
COPY --from=build /opt/sfu-delegate /opt/sfu-delegate
ENV PATH=/opt/sfu-delegate/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SFU_DELEGATE_LISTEN__HOST=0.0.0.0 \
    SFU_DELEGATE_LISTEN__PORT=8080 \
    SFU_DELEGATE_ADMIN__PORT=8081 \
    SFU_DELEGATE_DATABASE=sqlite:////var/lib/sfu-delegate/sfu-delegate.db
USER 10001:10001
WORKDIR /var/lib/sfu-delegate
VOLUME /var/lib/sfu-delegate
EXPOSE 8080
# The admin listener is on the container's loopback, unless SFU_DELEGATE_ADMIN__HOST says otherwise.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=3 CMD ["sfu-delegate", "healthcheck"]
ENTRYPOINT ["sfu-delegate"]
CMD ["serve", "--config", "/etc/sfu-delegate/sfu-delegate.yaml"]
