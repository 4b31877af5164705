# stb-run and stb-convert; by default, the server. docs/installation.md says how to build and run it.

FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN packaging/install.sh /opt/stb

FROM debian:bookworm-slim
RUN useradd --create-home --uid 10001 stb
COPY --from=build /opt/stb /usr/local
COPY packaging/healthcheck.sh /usr/local/lib/stb/healthcheck.sh
USER stb
WORKDIR /models
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=5s --start-period=2m CMD ["/usr/local/lib/stb/healthcheck.sh"]
ENTRYPOINT ["stb-run"]
# An address that other machines can reach needs a key: STB_API_KEY.
CMD ["serve", "--host", "0.0.0.0", "--port", "8080", "model.stb"]
