//! Lists the modules of this package, so that a log filter that names none of them can be refused.

use std::{env, fs, io, path::Path};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=src");
    let mut modules = vec!["dsd".to_owned()];
    find(Path::new("src"), "dsd", &mut modules)?;
    modules.sort();
    let out = env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?;
    fs::write(Path::new(&out).join("modules.rs"), format!("&{modules:?}"))
}

/// Adds the modules of a folder, whose own path is `parent`.
fn find(folder: &Path, parent: &str, modules: &mut Vec<String>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let Some(stem) = path.file_stem().and_then(|stem| stem.to_str()) else {
            continue;
        };
        let module = format!("{parent}::{stem}");
        if path.is_dir() {
            find(&path, &module, modules)?;
            modules.push(module);
        } else if path.extension().is_some_and(|ext| ext == "rs")
            && !["mod", "lib", "main"].contains(&stem)
        {
            modules.push(module);
        }
    }
    Ok(())
}
