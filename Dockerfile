# docker build -t sfu-delegate .
# docker run -v ./sfu-delegate.yaml:/etc/sfu-delegate/sfu-delegate.yaml:ro -v sfu-delegate:/var/lib/sfu-delegate -p 127.0.0.1:8080:8080 sfu-delegate
ARG BASE_IMAGE=python:3.13-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /build
RUN python -m venv /opt/sfu-delegate
# The locked packages in a layer of their own: it is kept until they change.
COPY requirements/run.txt requirements/run.txt
RUN /opt/sfu-delegate/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements/run.txt
COPY pyproject.toml README.md LICENSE ./
COPY sfu_delegate sfu_delegate
RUN /opt/sfu-delegate/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation .

FROM ${BASE_IMAGE}
RUN groupadd --gid 10001 sfu-delegate \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/sfu-delegate --shell /usr/sbin/nologin sfu-delegate \
 && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/sfu-delegate
COPY --from=build /opt/sfu-delegate /opt/sfu-delegate
ENV PATH=/opt/sfu-delegate/bin:$PATH \
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
HEALTHCHECK --interval=15s --timeout=5s --start-period=15s --retries=3 CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%s/health/live' % os.environ['SFU_DELEGATE_ADMIN__PORT'], timeout=4)"]
ENTRYPOINT ["sfu-delegate"]
CMD ["serve", "--config", "/etc/sfu-delegate/sfu-delegate.yaml"]
