//! Writes the generated parts of `spec/`: test vectors, manifest, registry, example page.

fn main() -> anyhow::Result<()> {
    stb_tests::vectors::write(&stb_tests::paths::root().join("spec"))?;
    Ok(())
}
