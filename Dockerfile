# The program in a small image. Build:     docker build -t gptq .
# With what it needs of CUDA:              docker build -t gptq:cuda --build-arg CUDA=1 .
# Serve on a card:                         docker run --rm --gpus all -p 3000:3000 -v "$PWD/q4:/model:ro" \
#                                              -e API_KEY=... gptq:cuda serve --model-id /model --hostname 0.0.0.0

ARG RUST=1.95
FROM rust:${RUST}-slim-trixie AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
# The folder of the build and the registry stay with the builder, not with the layer.
RUN --mount=type=cache,target=/source/target --mount=type=cache,target=/usr/local/cargo/registry \
    cargo build --release --locked --package gptq && install -D --strip target/release/gptq /out/bin/gptq \
    && /out/bin/gptq man --out /out/share/man/man1

# The program loads these when it runs and finds a card; the driver comes from the host.
FROM python:3.13-slim-trixie AS cuda
ARG CUDA=
RUN mkdir -p /cuda && if [ -n "$CUDA" ]; then \
        pip install --no-cache-dir --target /packages \
            'nvidia-cuda-nvrtc==13.0.*' 'nvidia-cublas==13.*' \
        && find /packages -name '*.so*' -exec mv -t /cuda {} +; \
    fi

FROM debian:trixie-slim
RUN useradd --create-home --uid 10001 gptq
COPY --from=build /out/ /usr/local/
COPY --from=cuda /cuda/ /usr/local/lib/cuda/
ENV LD_LIBRARY_PATH=/usr/local/lib/cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER gptq
WORKDIR /home/gptq
EXPOSE 3000
ENTRYPOINT ["gptq"]
CMD ["--help"]
