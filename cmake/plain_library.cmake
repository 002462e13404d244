# The kernels for C++: headers, find_package(alexnet_ext) and one library with the launchers for the CPU and, if nvcc is
# found, for CUDA. The library is static, so that a program takes only the kernels that it calls.
#   -DCMAKE_CUDA_ARCHITECTURES=90             the GPUs (default: 80 and 90, with PTX for newer ones)
#   -DCMAKE_CUDA_COMPILER=NOTFOUND            no CUDA, even if nvcc is found
include(CheckLanguage)
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
endif()
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(DEPENDENCIES "include(CMakeFindDependencyMacro)\nfind_dependency(CUDAToolkit)\n")
else()
  message(STATUS "The CUDA kernels are left out: no nvcc was found (looked on PATH, in CUDACXX)")
endif()

add_library(alexnet_ext STATIC ${CPU_OBJECTS})
target_compile_features(alexnet_ext PUBLIC cxx_std_17)
target_include_directories(alexnet_ext INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
if("avx2" IN_LIST ISAS)
  target_compile_definitions(alexnet_ext PUBLIC ALEXNET_X86)
endif()
if(CMAKE_CUDA_COMPILER)
  target_sources(alexnet_ext PRIVATE ${CUDA_KERNELS})
  target_compile_definitions(alexnet_ext INTERFACE ALEXNET_CUDA)
  target_link_libraries(alexnet_ext PUBLIC CUDA::cudart_static)
endif()

# Public headers: <op>/<op>.h, which declares the launchers of an op, and the headers of common/ that these include.
set(HEADERS common/channel_sums.h common/isa.h common/relu_mask.h common/types.h)
file(GLOB OPS CONFIGURE_DEPENDS RELATIVE ${CMAKE_SOURCE_DIR}/csrc csrc/*/*_ops.cpp)
list(FILTER OPS EXCLUDE REGEX "_cuda_ops\\.cpp$")
list(TRANSFORM OPS REPLACE "_ops\\.cpp$" ".h")
foreach(header IN LISTS HEADERS OPS)
  get_filename_component(folder ${header} DIRECTORY)
  install(FILES csrc/${header} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/alexnet_ext/${folder})
endforeach()

file(STRINGS alexnet_ext/_version.py VERSION REGEX "^__version__")
string(REGEX REPLACE ".*\"(.*)\"" "\\1" VERSION "${VERSION}")
set(PACKAGE ${CMAKE_INSTALL_LIBDIR}/cmake/alexnet_ext)
install(TARGETS alexnet_ext EXPORT alexnet_ext)
install(EXPORT alexnet_ext NAMESPACE alexnet_ext:: FILE alexnet_ext-targets.cmake DESTINATION ${PACKAGE})
write_basic_package_version_file(alexnet_ext-config-version.cmake VERSION ${VERSION} COMPATIBILITY SameMinorVersion)
file(CONFIGURE OUTPUT alexnet_ext-config.cmake
  CONTENT "@DEPENDENCIES@include(\"\${CMAKE_CURRENT_LIST_DIR}/alexnet_ext-targets.cmake\")\n" @ONLY)
install(FILES ${CMAKE_BINARY_DIR}/alexnet_ext-config.cmake ${CMAKE_BINARY_DIR}/alexnet_ext-config-version.cmake
  DESTINATION ${PACKAGE})
